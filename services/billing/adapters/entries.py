"""The ledger's entries as they are read."""

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from services.billing.adapters.database import reading
from services.billing.adapters.tables import LEDGER as L
from services.billing.core.charging import Entry
from services.billing.core.generation import Key

__all__ = ["Entries"]


class Entries:
    """Reads entries. Every method raises ``LedgerUnavailable`` when the database does not answer."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    async def of(self, key: Key) -> list[Entry]:
        """Return a generation's entries in the order in which they were written."""
        same = (L.c[name] == value for name, value in key._asdict().items())
        async with reading(self.engine) as connection:
            rows = await connection.execute(sa.select(L).where(*same).order_by(L.c.number))
            return [Entry(**row) for row in rows.mappings()]
