"""Read ledger entries."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from services.billing.adapters.database import reading
from services.billing.adapters.tables import LEDGER as L
from services.billing.core.charging import Entry
from services.billing.core.generation import Key
from services.billing.core.question import PageKey

__all__ = ["Entries"]

_ORDER = (L.c.created_at, L.c.session, L.c.generation, L.c.number)


class Entries:
    """Read ledger entries. Every method raises ``LedgerUnavailable`` when the database does not answer."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    async def of(self, key: Key) -> list[Entry]:
        """Return a generation's entries in the order they were written."""
        same = [L.c[name] == value for name, value in key._asdict().items()]
        return await self._read(sa.select(L).where(*same).order_by(L.c.number))

    async def listed(
        self,
        tenant: str,
        start: int | None,
        end: int | None,
        exact: Sequence[tuple[str, str]],
        after: PageKey | None,
        limit: int,
    ) -> list[Entry]:
        """Return a tenant's entries written from ``start`` up to ``end`` (milliseconds since 1970), the oldest first.

        ``exact``: columns that must equal a value. ``after``: time, session, generation and number.
        """
        query = sa.select(L).where(L.c.tenant == tenant, *(L.c[name] == value for name, value in exact))
        if start is not None:
            query = query.where(L.c.created_at >= start)
        if end is not None:
            query = query.where(L.c.created_at < end)
        if after is not None:
            query = query.where(sa.tuple_(*_ORDER) > sa.tuple_(*after))
        return await self._read(query.order_by(*_ORDER).limit(limit))

    async def _read(self, query: sa.Select[Any]) -> list[Entry]:
        async with reading(self.engine) as connection:
            rows = await connection.execute(query)
            return [Entry(**row) for row in rows.mappings()]
