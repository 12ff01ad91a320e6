"""Measure the latency of billing's queries over very many generations."""

import asyncio
import random
import time
from datetime import UTC, datetime
from decimal import Decimal
from statistics import median
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from services.billing.adapters.database import migrate, open_engine, writing
from services.billing.adapters.reports import Reports
from services.billing.adapters.tables import GENERATIONS, SPENDING
from services.billing.core.question import Filters
from services.billing.core.spending import DAY, DIMENSIONS, SUMS

__all__ = ["Asked", "ask_many"]

ROUNDS: Final = 9
CHUNK: Final = 20_000
TENANTS: Final = 20
BIG: Final = "t3"
"""The tenant of nine out of ten generations."""
KEYS: Final = 5
"""Number of credentials per tenant."""
MODELS: Final = 12
DAYS: Final = 90
_START: Final = round(datetime(2026, 1, 1, tzinfo=UTC).timestamp() * 1_000)


class Asked(msgspec.Struct, kw_only=True):
    """Result of one query: median and slowest round in milliseconds, and the number of rows."""

    question: str
    median_ms: float
    slowest_ms: float
    rows: int


async def ask_many(url: sa.URL, generations: int) -> list[Asked]:
    """Fill an empty database and query it: ``generations`` of 12 models over 90 days, nine out of ten of one tenant."""
    async with open_engine(url) as engine:
        await migrate(engine)
        await _fill(engine, generations)
        return await _ask(Reports(engine))


async def _fill(engine: AsyncEngine, generations: int) -> None:
    rng = random.Random(1)
    for first in range(0, generations, CHUNK):
        rows = [_row(number, rng) for number in range(first, min(first + CHUNK, generations))]
        async with writing(engine) as connection:
            await connection.execute(sa.insert(GENERATIONS), rows)
    async with writing(engine) as connection:
        await connection.execute(_summing())
    if engine.dialect.name == "postgresql":
        async with engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(sa.text("VACUUM ANALYZE"))


def _row(number: int, rng: random.Random) -> dict[str, Any]:
    model = rng.randrange(MODELS)
    tenant = BIG if rng.random() < 0.9 else f"t{rng.randrange(TENANTS)}"
    output = rng.randrange(10, 900)
    row: dict[str, Any] = {c.name: _default(c) for c in GENERATIONS.c}
    return row | {
        "tenant": tenant,
        "session": f"s{number % 50_000}",
        "generation": f"gen_{number}",
        "state": "completed",
        "status": rng.choices(("matched", "drift", "partial"), (90, 6, 4))[0],
        "model": f"model-{model}",
        "provider": f"p{model % 4}",
        "credential": f"key-{tenant}-{rng.randrange(KEYS)}",
        "started_at": _START + rng.randrange(DAYS) * DAY + rng.randrange(DAY),
        "counted_input": 100,
        "counted_output": output,
        "input": 100,
        "output": output,
        "cached_input": 0,
        "cache_write": 0,
        "cache_write_1h": 0,
        "reasoning": 0,
        "drift_output": 0,
        "pricing": "charged",
        "tokens": 100 + output,
        "amount": Decimal(output) / 1_000_000,
        "currency": "USD",
        "entries": 1,
    }


def _default(column: sa.Column[Any]) -> Any:
    if column.nullable:
        return None
    return False if isinstance(column.type, sa.Boolean) else "" if isinstance(column.type, sa.String) else 0


def _summing() -> sa.Executable:
    g = GENERATIONS.c
    day = g.started_at.op("/")(sa.literal_column(str(DAY)))
    places = {"day": day} | {name: g[name] for name in DIMENSIONS if name != "day"}
    sums = {"generations": sa.func.count(), "drift": sa.func.sum(g.drift_output), "unpriced": sa.literal_column("0")}
    sums |= {name: sa.func.sum(g[name]) for name in SUMS if name not in sums}
    query = sa.select(*places.values(), *(sums[name] for name in SUMS)).group_by(*places.values())
    return sa.insert(SPENDING).from_select([*places, *SUMS], query)


async def _ask(reports: Reports) -> list[Asked]:
    month = Filters(tenant=BIG, start=_START, end=_START + 31 * DAY)
    odd = Filters(tenant=BIG, start=_START + 1, end=_START + 31 * DAY)
    page = (await reports.generations(Filters(tenant=BIG), None, 20_000))[-1]
    after = (page.started_at, page.generation)
    questions: dict[str, Any] = {
        "all generations by model and day": lambda: reports.groups(Filters(), ("model", "day"), None, 2_000),
        "a tenant's by model and day": lambda: reports.groups(Filters(tenant=BIG), ("model", "day"), None, 2_000),
        "a tenant's month by key": lambda: reports.groups(month, ("key",), None, 1_000),
        "a tenant's, not by whole days, by model and hour": lambda: reports.groups(odd, ("model", "hour"), None, 1_000),
        "a tenant's generations, first page": lambda: reports.generations(Filters(tenant=BIG), None, 100),
        "a tenant's generations, a page far in": lambda: reports.generations(Filters(tenant=BIG), after, 100),
        "a tenant's partial generations": lambda: reports.generations(Filters(tenant=BIG, status="partial"), None, 100),
        "one generation, looked for with every tenant": lambda: _one(reports),
    }
    return [await _timed(name, ask) for name, ask in questions.items()]


async def _one(reports: Reports) -> list[Any]:
    return [found for n in range(TENANTS) if (found := await reports.generation(f"t{n}", "gen_77"))]


async def _timed(name: str, ask: Any) -> Asked:
    took: list[float] = []
    rows: list[Any] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        rows = await ask()
        took.append((time.perf_counter() - began) * 1_000)
        await asyncio.sleep(0)
    return Asked(question=name, median_ms=round(median(took), 1), slowest_ms=round(max(took), 1), rows=len(rows))
