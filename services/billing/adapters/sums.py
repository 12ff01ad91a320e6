"""Move the usage sums and release reservations within the transaction of a settlement."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from services.billing.adapters.tables import RESERVATIONS as R
from services.billing.adapters.tables import SPENDING as S
from services.billing.core.budgets import TOKENS
from services.billing.core.generation import Key
from services.billing.core.spending import DIMENSIONS, SUMS, Step

__all__ = ["SpendingWriter"]

_release = sa.delete(R).where(*(R.c[name] == sa.bindparam(f"key_{name}") for name in Key._fields))
_reserved = sa.select(*(R.c[name] for name in Key._fields), R.c.currency, R.c.tokens, R.c.amount)
AT_ONCE: Final = 500
_any_reserved = sa.select(sa.exists(sa.select(R.c.tenant)))


class SpendingWriter:
    """Write usage sums within the transaction of a connection."""

    def __init__(self, dialect: str) -> None:
        insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
        statement = insert(S)
        self._add = statement.on_conflict_do_update(
            index_elements=list(DIMENSIONS),
            set_={name: S.c[name] + statement.excluded[name] for name in SUMS},
        )

    async def apply(
        self, connection: AsyncConnection, steps: Sequence[Step], released: Sequence[Key]
    ) -> dict[Key, dict[str, Decimal]]:
        """Move the sums in the order all writers share, and delete reservations; return the deleted ones, by unit."""
        if steps:
            await connection.execute(self._add, [step.key._asdict() | step.sums._asdict() for step in steps])
        found: dict[Key, dict[str, Decimal]] = {}
        if released and (await connection.execute(_any_reserved)).scalar_one():
            key = sa.tuple_(*(R.c[name] for name in Key._fields))
            for start in range(0, len(released), AT_ONCE):
                some = [tuple(key) for key in released[start : start + AT_ONCE]]
                for row in await connection.execute(_reserved.where(key.in_(some))):
                    own = found.setdefault(Key(*row[:3]), {})
                    own[row.currency or TOKENS] = row.amount if row.currency else Decimal(row.tokens)
            await connection.execute(_release, [{f"key_{n}": v for n, v in k._asdict().items()} for k in released])
        return found
