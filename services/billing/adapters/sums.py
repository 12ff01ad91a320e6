"""The sums of what was used, moved in the transaction that settles; what was reserved for it is given back there."""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from services.billing.adapters.tables import RESERVATIONS as R
from services.billing.adapters.tables import SPENDING as S
from services.billing.core.generation import Key
from services.billing.core.spending import PLACE, SUMS, Step

__all__ = ["Sums"]

_release = sa.delete(R).where(*(R.c[name] == sa.bindparam(f"key_{name}") for name in Key._fields))
_any_reserved = sa.select(sa.exists(sa.select(R.c.tenant)))


class Sums:
    """Writes on a connection, within its transaction."""

    def __init__(self, dialect: str) -> None:
        insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
        statement = insert(S)
        self._add = statement.on_conflict_do_update(
            index_elements=list(PLACE),
            set_={name: S.c[name] + statement.excluded[name] for name in SUMS},
        )

    async def apply(self, connection: AsyncConnection, steps: Sequence[Step], released: Sequence[Key]) -> None:
        """Move the sums, in an order that all writers share, and forget reservations."""
        if steps:
            await connection.execute(self._add, [step.place._asdict() | step.sums._asdict() for step in steps])
        if released and (await connection.execute(_any_reserved)).scalar_one():
            await connection.execute(_release, [{f"key_{n}": v for n, v in k._asdict().items()} for k in released])
