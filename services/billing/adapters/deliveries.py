"""Delivery reports in SQL: the newest report of each counter, and their sums in the generation's row."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from schemas.delivered import DeliveredReport
from services.billing.adapters.database import reading, writing
from services.billing.adapters.tables import DELIVERIES as D
from services.billing.adapters.tables import GENERATIONS as G
from services.billing.core.generation import DELIVERED

__all__ = ["Deliveries"]

AT_ONCE: Final = 300
_KEY: Final = ("tenant", "session", "generation")
_COUNTS: Final = ("number", "subscribers", "events", "tokens", "sent_tokens", "bytes")
_same = [D.c[name] == G.c[name] for name in _KEY]


class Deliveries:
    """Write delivery reports. Every method raises ``LedgerUnavailable`` when the database does not answer."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
        statement = insert(D)
        changed = {name: statement.excluded[name] for name in (*_COUNTS, "reported_at", "placed")}
        self._upsert = statement.on_conflict_do_update(
            index_elements=[*_KEY, "counter"], set_=changed, where=D.c.number < statement.excluded.number
        )

    async def put(self, reports: Iterable[DeliveredReport]) -> None:
        """Store the newest report of each counter; repeated and older reports change nothing."""
        newest: dict[tuple[str, ...], DeliveredReport] = {}
        for report in reports:
            key = (report.tenant, report.session, report.generation, report.counter)
            if key not in newest or newest[key].number < report.number:
                newest[key] = report
        if newest:
            async with writing(self.engine) as connection:
                await connection.execute(self._upsert, [_row(newest[key]) for key in sorted(newest)])

    async def update_generations(self) -> int:
        """Write new sums to the generations that exist by now; return their number."""
        placed = 0
        while True:
            async with reading(self.engine) as connection:
                keys = await _waiting(connection)
            if keys:
                async with writing(self.engine) as connection:
                    await _write(connection, keys)
            placed += len(keys)
            if len(keys) < AT_ONCE:
                return placed


def _row(report: DeliveredReport) -> dict[str, Any]:
    row = {name: getattr(report, name) for name in (*_KEY, "counter", *_COUNTS)}
    return row | {"reported_at": round(report.at * 1_000), "placed": False}


async def _waiting(connection: AsyncConnection) -> Sequence[tuple[Any, ...]]:
    """Return generations with new reports, in the order in which all writers lock them."""
    key = [D.c[name] for name in _KEY]
    query = sa.select(*key).distinct().join(G, sa.and_(*_same)).where(sa.not_(D.c.placed)).order_by(*key)
    return [tuple(row) for row in await connection.execute(query.limit(AT_ONCE))]


async def _write(connection: AsyncConnection, keys: Sequence[tuple[Any, ...]]) -> None:
    # Locked: a concurrent report waits, or becomes a row of its own that is placed later.
    named = sa.tuple_(*(D.c[name] for name in _KEY)).in_(keys)
    query = sa.select(D).where(named).order_by(*(D.c[name] for name in (*_KEY, "counter"))).with_for_update()
    sums: dict[tuple[str, ...], dict[str, int]] = {}
    seen: list[dict[str, Any]] = []
    for row in (await connection.execute(query)).mappings():
        _add(sums.setdefault(tuple(row[name] for name in _KEY), dict.fromkeys(DELIVERED, 0)), row)
        seen.append({f"key_{name}": row[name] for name in (*_KEY, "counter")})
    update = sa.update(G).where(*(G.c[n] == sa.bindparam(f"key_{n}") for n in _KEY))
    values = [{f"key_{n}": v for n, v in zip(_KEY, key, strict=True)} | sums[key] for key in sorted(sums)]
    await connection.execute(update.values({name: sa.bindparam(name) for name in DELIVERED}), values)
    done = sa.update(D).where(*(D.c[n] == sa.bindparam(f"key_{n}") for n in (*_KEY, "counter"))).values(placed=True)
    await connection.execute(done, seen)


def _add(sums: dict[str, int], row: Mapping[Any, Any]) -> None:
    sums["subscribers"] += row["subscribers"]
    sums["delivered_events"] += row["events"]
    sums["delivered_bytes"] += row["bytes"]
    sums["delivered_tokens"] = max(sums["delivered_tokens"], row["tokens"])
