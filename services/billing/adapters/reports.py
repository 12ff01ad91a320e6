"""Answer usage queries: from daily sums where they suffice, otherwise from single generations."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncEngine

from services.billing.adapters.database import reading
from services.billing.adapters.tables import GENERATIONS as G
from services.billing.adapters.tables import SPENDING as S
from services.billing.core.generation import Generation
from services.billing.core.money import ZERO, render
from services.billing.core.question import LABEL, Filters, PageKey, is_summed
from services.billing.core.spending import DAY, OPEN, SUMS

__all__ = ["Reports", "Totals"]

_NUMBERS: Final = tuple(name for name in SUMS if name != "amount")
_OF_ONE: Final[Mapping[str, sa.ColumnElement[Any]]] = {
    "generations": sa.literal_column("1", sa.BigInteger),
    "tokens": G.c.tokens,
    "amount": G.c.amount,
    "input": G.c.input,
    "output": G.c.output,
    "cached_input": G.c.cached_input,
    "cache_write": G.c.cache_write,
    "cache_write_1h": G.c.cache_write_1h,
    "reasoning": G.c.reasoning,
    "counted_input": G.c.counted_input,
    "counted_output": G.c.counted_output,
    "drift": G.c.drift_output,
    "unpriced": sa.case((G.c.pricing == "unpriced", 1), else_=0),
}


class Totals(msgspec.Struct, kw_only=True):
    """Sums over generations, in tokens.

    ``tokens`` were charged; ``amounts`` by currency. ``drift``: reported minus counted output where both are known.
    ``unpriced``: generations that found no price.
    """

    generations: int = 0
    tokens: int = 0
    input: int = 0
    output: int = 0
    cached_input: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    reasoning: int = 0
    counted_input: int = 0
    counted_output: int = 0
    drift: int = 0
    unpriced: int = 0
    amounts: dict[str, str] = {}


class Reports:
    """Answer the API's usage queries. Every method raises ``LedgerUnavailable`` when the database does not answer."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._postgres = engine.dialect.name == "postgresql"

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
        """Return the sums over all generations that match ``filters``."""
        found = await self.groups(filters, (), None, 1)
        return found[0][1] if found else Totals()

    async def generations(self, filters: Filters, after: PageKey | None, limit: int) -> list[Generation]:
        """Return generations by start and name, beginning after that pair."""
        order = (G.c.started_at, G.c.generation)
        query = sa.select(G).where(*self._conditions(filters)).order_by(*order).limit(limit)
        if after is not None:
            query = query.where(sa.tuple_(*order) > sa.tuple_(*after))
        async with reading(self.engine) as connection:
            rows = (await connection.execute(query)).mappings().all()
        return [Generation(**row) for row in rows]

    async def groups(
        self, filters: Filters, group_by: Sequence[str], after: PageKey | None, limit: int
    ) -> list[tuple[PageKey, Totals]]:
        """Return sums by group, sorted by key, beginning after the key ``after``."""
        source = self._source(filters, group_by)
        keys = [source.c[f"key_{i}"] for i in range(len(group_by))]
        sums = [sa.func.sum(source.c[name]).label(name) for name in _NUMBERS]
        query = sa.select(*keys, *sums).group_by(*keys).order_by(*keys).limit(limit)
        if after is not None:
            query = query.where(sa.tuple_(*keys) > sa.tuple_(*after))
        if not keys:
            query = query.having(sa.func.count() > 0)
        async with reading(self.engine) as connection:
            rows = (await connection.execute(query)).all()
            found = {tuple(row[: len(keys)]): _totals(row) for row in rows}
            if found:
                money = self._amounts(source, keys, min(found), max(found))
                for *key, currency, amount in (await connection.execute(money)).all():
                    found[tuple(key)].amounts[currency] = render(Decimal(amount))
        return list(found.items())

    @staticmethod
    def _amounts(source: Any, keys: Sequence[Any], first: PageKey, last: PageKey) -> sa.Select[Any]:
        query = sa.select(*keys, source.c.currency, sa.func.sum(source.c.amount, type_=S.c.amount.type))
        if keys:
            query = query.where(sa.tuple_(*keys) >= sa.tuple_(*first), sa.tuple_(*keys) <= sa.tuple_(*last))
        query = query.where(source.c.currency != "", source.c.amount != ZERO).group_by(*keys, source.c.currency)
        return query.order_by(*keys, source.c.currency)

    def _source(self, filters: Filters, group_by: Sequence[str]) -> Any:
        """Return a query for the groups' keys, numbers to sum, amount and currency."""
        if not is_summed(filters, group_by):
            return self._single(filters, group_by, ()).subquery("rows")
        parts = [self._summed(filters, group_by), self._single(filters, group_by, OPEN)]
        return sa.union_all(*parts).subquery("rows")

    def _summed(self, filters: Filters, group_by: Sequence[str]) -> sa.Select[Any]:
        columns: Mapping[str, Any] = dict(S.c) | {"key": S.c.credential}
        keys = [self._dimension(name, columns, S.c.day, DAY).label(f"key_{i}") for i, name in enumerate(group_by)]
        conditions = [columns[n] == v for n, v in filters.exact() if n != "session"]
        if filters.start is not None:
            conditions.append(S.c.day >= filters.start // DAY)
        if filters.end is not None:
            conditions.append(S.c.day < filters.end // DAY)
        return sa.select(*keys, *(S.c[name] for name in SUMS), S.c.currency).where(*conditions)

    def _single(self, filters: Filters, group_by: Sequence[str], statuses: Sequence[str]) -> sa.Select[Any]:
        columns: Mapping[str, Any] = dict(G.c) | {"key": G.c.credential}
        keys = [self._dimension(n, columns, G.c.started_at, 1).label(f"key_{i}") for i, n in enumerate(group_by)]
        numbers = [sa.func.coalesce(_OF_ONE[name], 0).label(name) for name in SUMS]
        query = sa.select(*keys, *numbers, G.c.currency).where(*self._conditions(filters))
        return query.where(G.c.status.in_(statuses)) if statuses else query

    def _dimension(self, name: str, columns: Mapping[str, Any], time: Any, unit: int) -> sa.ColumnElement[Any]:
        """Return a group's key; ``time`` is counted in ``unit`` milliseconds."""
        match name:
            case "hour" | "day":
                width = (3_600_000 if name == "hour" else DAY) // unit
                # As literal text: PostgreSQL would treat the parameters of SELECT and GROUP BY as different ones.
                bucket: sa.ColumnElement[Any] = time.op("/")(sa.literal_column(str(width), sa.BigInteger))
                return bucket
            case "month":
                return self._month(time, unit // 1_000 if unit > 1 else None)
            case _ if name.startswith(LABEL):
                return self._label(name.removeprefix(LABEL))
            case _:
                column: sa.ColumnElement[Any] = columns[name]
                return column

    def _month(self, time: Any, seconds: int | None) -> sa.ColumnElement[Any]:
        """Return months since the year 0; ``time`` in units of ``seconds``, or in milliseconds if None."""
        moment = time / sa.literal_column("1000") if seconds is None else time * sa.literal_column(str(seconds))
        if self._postgres:
            utc = sa.func.timezone("UTC", sa.func.to_timestamp(moment))
            year, month = sa.extract("year", utc), sa.extract("month", utc)
            return sa.cast(year * sa.literal_column("12") + month - sa.literal_column("1"), sa.BigInteger)
        parts = [sa.cast(sa.func.strftime(f"%{p}", moment, "unixepoch"), sa.Integer) for p in "Ym"]
        return parts[0] * sa.literal_column("12") + parts[1] - sa.literal_column("1")

    def _label(self, name: str) -> sa.ColumnElement[Any]:
        stored = sa.func.nullif(G.c.metadata, "")
        if self._postgres:
            value = sa.cast(stored, postgresql.JSONB)[sa.literal_column("'" + name + "'", sa.Text)].astext
        else:
            value = sa.func.json_extract(stored, sa.literal_column(f"'$.\"{name}\"'", sa.Text))
        return sa.func.coalesce(value, sa.literal_column("''"))

    def _conditions(self, filters: Filters) -> list[sa.ColumnElement[bool]]:
        columns: Mapping[str, Any] = dict(G.c) | {"key": G.c.credential}
        found: list[sa.ColumnElement[bool]] = [columns[name] == value for name, value in filters.exact()]
        if filters.start is not None:
            found.append(G.c.started_at >= filters.start)
        if filters.end is not None:
            found.append(G.c.started_at < filters.end)
        if filters.pricing is not None:
            found.append(G.c.pricing == filters.pricing)
        if filters.label is not None:
            name, value = filters.label
            found.append(self._label(name) == value)
        return found


def _totals(row: sa.Row[Any]) -> Totals:
    return Totals(**{name: int(getattr(row, name) or 0) for name in _NUMBERS}, amounts={})
