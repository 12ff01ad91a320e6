"""Budgets and reservations in SQL. A tenant's reservations are serialised across processes."""

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from schemas.budgets import Release, Reserve
from services.billing.adapters.database import reading, writing
from services.billing.adapters.tables import BUDGETS as B
from services.billing.adapters.tables import GENERATIONS as G
from services.billing.adapters.tables import RESERVATIONS as R
from services.billing.adapters.tables import SPENDING as S
from services.billing.core.budgets import TOKENS, Budget, Need, Standing, Verdict, admit, period_at
from services.billing.core.generation import Generation
from services.billing.core.money import ZERO
from services.billing.core.spending import DAY

__all__ = ["Budgets", "Running"]

AT_ONCE: Final = 5_000
_GENERATION_KEY: Final = ("tenant", "session", "generation")


class Running(NamedTuple):
    """A running generation of a tenant with hard limits, and its reservation: tokens, and money by currency."""

    generation: Generation
    tokens: int
    money: dict[str, Decimal]


class Budgets:
    """Read and write budgets and reservations. Times in milliseconds since 1970.

    Every method raises ``LedgerUnavailable`` when the database does not answer.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert

    async def put(self, budget: Budget, now: int) -> bool:
        """Create or replace a budget; return whether it is new."""
        async with writing(self.engine) as connection:
            known = await connection.execute(_of(budget.tenant, budget.name).with_only_columns(B.c.name))
            values = _values(budget, now)
            statement = self._insert(B).values(values)
            changed = {n: statement.excluded[n] for n in values if n not in ("tenant", "name")}
            await connection.execute(statement.on_conflict_do_update(index_elements=["tenant", "name"], set_=changed))
            return known.first() is None

    async def delete(self, tenant: str, name: str) -> bool:
        """Delete a budget; return whether it existed."""
        async with writing(self.engine) as connection:
            gone = await connection.execute(sa.delete(B).where(B.c.tenant == tenant, B.c.name == name))
            return gone.rowcount > 0

    async def tenants(self) -> list[str]:
        """Return the tenants that have budgets."""
        async with reading(self.engine) as connection:
            return list((await connection.execute(sa.select(B.c.tenant).distinct())).scalars())

    async def standings(self, tenant: str, now: int, name: str | None = None) -> list[Standing]:
        """Return the standings of a tenant's budgets, or of one of them."""
        async with reading(self.engine) as connection:
            return [await _standing(connection, b, now) for b in await _budgets(connection, tenant, name)]

    async def reserve(
        self, tenant: str, asked: Sequence[tuple[Reserve, Need]], now: int, expires_at: int
    ) -> list[Verdict]:
        """Decide on a tenant's generations in order, and write a reservation for each admitted one.

        A repeated request for a generation that has a reservation or has begun is admitted.
        """
        async with writing(self.engine) as connection:
            # The row lock serialises this tenant's decisions; SQLite has only one writer anyway.
            query = _of(tenant).order_by(B.c.name).with_for_update()
            budgets = _read(await connection.execute(query))
            return [await self._decide(connection, budgets, *one, now, expires_at) for one in asked]

    async def _decide(
        self, connection: AsyncConnection, budgets: Sequence[Budget], reserve: Reserve, need: Need, now: int, until: int
    ) -> Verdict:
        covering = [b for b in budgets if b.covers(reserve.key)]
        if not covering or await _is_known(connection, reserve):
            return Verdict(None, None)
        verdict = admit([await _standing(connection, b, now) for b in covering], need)
        if verdict.refused is None:
            await connection.execute(self._insert(R), _reservation(reserve, need, until))
        return verdict

    async def release(self, release: Release) -> None:
        """Release the reservation of a generation that did not begin."""
        key = [R.c[name] == getattr(release, name) for name in _GENERATION_KEY]
        async with writing(self.engine) as connection:
            await connection.execute(sa.delete(R).where(*key))

    async def expire(self, now: int) -> int:
        """Release expired reservations of generations that never began; return the number of rows."""
        begun = sa.exists(sa.select(G.c.tenant).where(*(G.c[n] == R.c[n] for n in _GENERATION_KEY)))
        async with writing(self.engine) as connection:
            return int((await connection.execute(sa.delete(R).where(R.c.expires_at < now, ~begun))).rowcount)

    async def running(self, limit: int = AT_ONCE) -> list[Running]:
        """Return the running generations of tenants with hard limits."""
        limited = sa.select(B.c.tenant).where(B.c.hard.is_not(None)).distinct()
        same = sa.and_(*(R.c[n] == G.c[n] for n in _GENERATION_KEY))
        columns = (R.c.currency.label("reserved_currency"), R.c.tokens.label("reserved"), R.c.amount.label("money"))
        query = (
            sa.select(G, *columns)
            .outerjoin(R, same)
            .where(G.c.status == "running", G.c.tenant.in_(limited))
            .order_by(G.c.tenant, G.c.session, G.c.generation)
            .limit(limit)
        )
        async with reading(self.engine) as connection:
            rows = (await connection.execute(query)).mappings().all()
        return _joined(rows)


def _joined(rows: Iterable[sa.RowMapping]) -> list[Running]:
    found: dict[tuple[str, ...], Running] = {}
    for row in rows:
        key = tuple(row[n] for n in _GENERATION_KEY)
        one = found.get(key)
        if one is None:
            names = Generation.__struct_fields__
            one = Running(Generation(**{n: row[n] for n in names}), 0, {})
        tokens = one.tokens + (row["reserved"] or 0)
        money = one.money | ({row["reserved_currency"]: row["money"]} if row["reserved_currency"] else {})
        found[key] = Running(one.generation, tokens, money)
    return list(found.values())


def _of(tenant: str, name: str | None = None) -> sa.Select[tuple[object, ...]]:
    query = sa.select(B).where(B.c.tenant == tenant)
    return query if name is None else query.where(B.c.name == name)


async def _budgets(connection: AsyncConnection, tenant: str, name: str | None) -> list[Budget]:
    return _read(await connection.execute(_of(tenant, name).order_by(B.c.name)))


def _read(rows: sa.CursorResult[tuple[object, ...]]) -> list[Budget]:
    return [
        Budget(
            tenant=row["tenant"],
            name=row["name"],
            period=row["period"],
            unit=row["unit"],
            soft=None if row["soft"] is None else Decimal(row["soft"]),
            hard=None if row["hard"] is None else Decimal(row["hard"]),
            key=row["credential"],
        )
        for row in rows.mappings()
    ]


def _values(budget: Budget, now: int) -> dict[str, object]:
    return {
        "tenant": budget.tenant,
        "name": budget.name,
        "credential": budget.key,
        "period": budget.period,
        "unit": budget.unit,
        "soft": None if budget.soft is None else f"{budget.soft:f}",
        "hard": None if budget.hard is None else f"{budget.hard:f}",
        "changed_at": now,
    }


async def _standing(connection: AsyncConnection, budget: Budget, now: int) -> Standing:
    """Read spent and reserved in one statement: a settlement moves usage from one to the other atomically."""
    first, after = period_at(budget.period, now)
    spent, reserved = [S.c.tenant == budget.tenant], [R.c.tenant == budget.tenant]
    spent += [S.c.day >= first // DAY, S.c.day < after // DAY]
    if budget.key:
        spent.append(S.c.credential == budget.key)
        reserved.append(R.c.credential == budget.key)
    if budget.unit == TOKENS:
        sums = (sa.func.sum(S.c.tokens), sa.func.sum(R.c.tokens))
    else:
        sums = (sa.func.sum(S.c.amount), sa.func.sum(R.c.amount))
        spent.append(S.c.currency == budget.unit)
        reserved.append(R.c.currency == budget.unit)
    query = sa.select(
        sa.select(sums[0]).where(*spent).scalar_subquery(), sa.select(sums[1]).where(*reserved).scalar_subquery()
    )
    used, held = (await connection.execute(query)).one()
    return Standing(budget, Decimal(used or ZERO), Decimal(held or ZERO))


async def _is_known(connection: AsyncConnection, reserve: Reserve) -> bool:
    for table in (R, G):
        key = [table.c[name] == getattr(reserve, name) for name in _GENERATION_KEY]
        if (await connection.execute(sa.select(table.c.tenant).where(*key).limit(1))).first() is not None:
            return True
    return False


def _reservation(reserve: Reserve, need: Need, expires_at: int) -> Sequence[dict[str, object]]:
    key = {name: getattr(reserve, name) for name in _GENERATION_KEY}
    shared = key | {"credential": reserve.key, "expires_at": expires_at}
    money = [shared | {"currency": c, "tokens": 0, "amount": amount} for c, amount in need.money.items()]
    return [shared | {"currency": "", "tokens": need.tokens, "amount": ZERO}, *money]
