"""Read the charged balance of generations from the ledger."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from services.billing.adapters.database import reading
from services.billing.adapters.tables import LEDGER as L
from services.billing.core.generation import Key, Pricing
from services.billing.core.money import ZERO

__all__ = ["Balance", "Balances"]

AT_ONCE: Final = 500


class Balance(msgspec.Struct, kw_only=True):
    """The sum of a generation's entries in the currency of the last entry; sums in other currencies are zero."""

    amount: Decimal = ZERO
    currency: str = ""
    entries: int = 0
    pricing: Pricing = "pending"


class Balances:
    """Read access to balances."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    async def of(self, keys: Sequence[Key]) -> dict[Key, Balance]:
        """Return the balances of the generations that have entries.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        found: dict[Key, Balance] = {}
        place = [L.c[name] for name in Key._fields]
        query = sa.select(*place, L.c.number, L.c.kind, L.c.amount, L.c.currency).order_by(*place, L.c.number)
        async with reading(self.engine) as connection:
            for start in range(0, len(keys), AT_ONCE):
                some = [tuple(key) for key in keys[start : start + AT_ONCE]]
                for row in await connection.execute(query.where(sa.tuple_(*place).in_(some))):
                    _add(found.setdefault(Key(*row[:3]), Balance()), row)
        return found


def _add(balance: Balance, row: Any) -> None:
    if row.currency != balance.currency:
        balance.amount, balance.currency = ZERO, row.currency
    balance.amount += row.amount
    balance.entries = row.number
    balance.pricing = "unpriced" if row.kind == "reversal" else "charged"
