"""Answers about usage, read from the ledger's tables."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from services.billing.adapters.database import reading
from services.billing.adapters.tables import GENERATIONS as G
from services.billing.core.generation import Generation
from services.billing.core.question import BUCKETS, Filters, PageKey

__all__ = ["Reports", "Totals"]


class Totals(msgspec.Struct, kw_only=True):
    """Sums over generations, in tokens. ``drift``: reported minus counted output where both are known."""

    generations: int = 0
    input: int = 0
    output: int = 0
    cached_input: int = 0
    cache_write: int = 0
    reasoning: int = 0
    counted_input: int = 0
    counted_output: int = 0
    drift: int = 0


_SUMS: Final = [
    sa.func.count().label("generations"),
    *(
        sa.func.coalesce(sa.func.sum(G.c[column]), 0).label(name)
        for name, column in (
            ("input", "input"),
            ("output", "output"),
            ("cached_input", "cached_input"),
            ("cache_write", "cache_write"),
            ("reasoning", "reasoning"),
            ("counted_input", "counted_input"),
            ("counted_output", "counted_output"),
            ("drift", "drift_output"),
        )
    ),
]


class Reports:
    """The database as the API needs it. Every method raises ``LedgerUnavailable`` when the database does not answer."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    async def generation(self, tenant: str, generation: str) -> Generation | None:
        """Return a generation by name; of several with one name (in different sessions) the latest."""
        query = (
            sa.select(G)
            .where(G.c.tenant == tenant, G.c.generation == generation)
            .order_by(G.c.started_at.desc(), G.c.session)
            .limit(1)
        )
        async with reading(self.engine) as connection:
            row = (await connection.execute(query)).mappings().first()
        return Generation(**row) if row else None

    async def totals(self, filters: Filters) -> Totals:
        """Return the sums over all that ``filters`` let through."""
        async with reading(self.engine) as connection:
            row = (await connection.execute(sa.select(*_SUMS).where(*_conditions(filters)))).one()
        return _totals(row)

    async def generations(self, filters: Filters, after: PageKey | None, limit: int) -> list[Generation]:
        """Return generations in the order of start and name, beginning after that pair."""
        order = (G.c.started_at, G.c.generation)
        query = sa.select(G).where(*_conditions(filters)).order_by(*order).limit(limit)
        if after is not None:
            query = query.where(sa.tuple_(*order) > sa.tuple_(*after))
        async with reading(self.engine) as connection:
            rows = (await connection.execute(query)).mappings().all()
        return [Generation(**row) for row in rows]

    async def groups(
        self, filters: Filters, group_by: Sequence[str], after: PageKey | None, limit: int
    ) -> list[tuple[PageKey, Totals]]:
        """Return sums by group in the order of the groups' keys, beginning after the key ``after``."""
        keys = [_dimension(name) for name in group_by]
        labelled = [key.label(f"key_{i}") for i, key in enumerate(keys)]
        query = sa.select(*labelled, *_SUMS).where(*_conditions(filters)).group_by(*keys).order_by(*keys).limit(limit)
        if after is not None:
            query = query.where(sa.tuple_(*keys) > sa.tuple_(*after))
        async with reading(self.engine) as connection:
            rows = (await connection.execute(query)).all()
        return [(tuple(row[: len(keys)]), _totals(row)) for row in rows]


def _totals(row: sa.Row[Any]) -> Totals:
    return Totals(**{name: int(getattr(row, name)) for name in Totals.__struct_fields__})


def _dimension(name: str) -> sa.ColumnElement[Any]:
    width = BUCKETS.get(name)
    # The width stands in the text: as a parameter PostgreSQL would take SELECT's and GROUP BY's for different ones.
    return G.c[name] if width is None else G.c.started_at.op("/")(sa.literal_column(str(width), sa.BigInteger))


def _conditions(filters: Filters) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if filters.start is not None:
        found.append(G.c.started_at >= filters.start)
    if filters.end is not None:
        found.append(G.c.started_at < filters.end)
    found += [
        G.c[name] == value
        for name in ("tenant", "model", "provider", "status", "session")
        if (value := getattr(filters, name)) is not None
    ]
    return found
