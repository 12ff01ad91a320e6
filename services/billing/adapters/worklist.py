"""Settlements that wait for something other than events: grace periods, price changes, provider exports.

A request for a settlement only leaves a row here; the process that holds the generation's partition settles it. So each
generation has one writer, and money does not depend on races.
"""

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from schemas.usage import Usage
from services.billing.adapters.database import reading
from services.billing.adapters.tables import CALLS as C
from services.billing.adapters.tables import GENERATIONS as G
from services.billing.adapters.tables import PROVIDER_USAGE as U
from services.billing.adapters.tables import RESETTLEMENTS as R
from services.billing.core.charging import Entry
from services.billing.core.generation import Generation, Key
from services.billing.core.spending import Step

__all__ = ["Export", "Money", "Worklist", "finish"]

AT_ONCE: Final = 1_000
_KEY: Final = ("tenant", "session", "generation")


class Money(msgspec.Struct, frozen=True, kw_only=True):
    """The money of a batch: entries, the price book's revision they were computed with, and the queued settlements
    done.

    ``exports``: rows of provider exports, by number, with their outcome. ``spending``: steps of the usage sums;
    ``released``: generations that are newly settled.
    """

    revision: int
    entries: Sequence[Entry] = ()
    resettled: Sequence[Key] = ()
    exports: Sequence[tuple[int, str]] = ()
    spending: Sequence[Step] = ()
    released: Sequence[Key] = ()


class Export(msgspec.Struct, frozen=True):
    """A row of a provider's export that concerns a generation.

    ``call``: the number of the abandoned call it belongs to; 0 for the last call.
    """

    id: int
    generation: Generation
    usage: Usage
    created_at: int
    call: int = 0


async def finish(connection: AsyncConnection, money: Money, now: int) -> None:
    """Remove completed settlements from the worklist."""
    if money.resettled:
        gone = sa.delete(R).where(*(R.c[name] == sa.bindparam(f"key_{name}") for name in _KEY))
        await connection.execute(gone, [{f"key_{n}": v for n, v in key._asdict().items()} for key in money.resettled])
    if money.exports:
        applied = sa.update(U).where(U.c.id == sa.bindparam("row")).values(applied_at=now, outcome=sa.bindparam("how"))
        await connection.execute(applied, [{"row": row, "how": how} for row, how in money.exports])


class Worklist:
    """The queued settlements of a partition. Every method raises ``LedgerUnavailable`` without an answer."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    async def due(self, partition: int, now: int, limit: int = AT_ONCE) -> list[Generation]:
        """Return generations whose next decision is due at ``now`` (milliseconds since 1970)."""
        query = sa.select(G).where(G.c.partition == partition, G.c.settle_at <= now).order_by(G.c.settle_at)
        return await self._generations(query.limit(limit))

    async def resettling(self, partition: int, limit: int = AT_ONCE) -> list[Generation]:
        """Return generations queued because the price book has changed."""
        same = [R.c[name] == G.c[name] for name in _KEY]
        query = sa.select(G).join(R, sa.and_(*same)).where(R.c.partition == partition)
        return await self._generations(query.limit(limit))

    async def exports(self, partition: int, limit: int = AT_ONCE) -> list[Export]:
        """Return unapplied rows of provider exports whose generation has ended, the oldest first."""
        found: dict[int, Export] = {}
        by_name = sa.and_(U.c.tenant == G.c.tenant, U.c.generation == G.c.generation)
        by_upstream = sa.and_(U.c.tenant == G.c.tenant, U.c.upstream_id == G.c.upstream_id, G.c.upstream_id != "")
        by_call = sa.and_(U.c.tenant == C.c.tenant, U.c.upstream_id == C.c.upstream_id)
        same = sa.and_(*(C.c[name] == G.c[name] for name in _KEY))
        last = sa.literal(0)
        for query, needed in (
            (_exported(last).select_from(G).join(U, by_name), U.c.generation != ""),
            (_exported(last).select_from(G).join(U, by_upstream), U.c.generation == ""),
            (_exported(C.c.number).select_from(G).join(C, same).join(U, by_call), U.c.generation == ""),
        ):
            waiting = (
                query.where(U.c.applied_at.is_(None), needed, G.c.partition == partition, G.c.state != "running")
                .order_by(U.c.id, G.c.started_at.desc())
                .limit(limit)
            )
            async with reading(self.engine) as connection:
                rows = (await connection.execute(waiting)).mappings().all()
            for row in rows:
                usage = msgspec.json.decode(row["export_usage"], type=Usage)
                export = Export(row["row"], _generation(row), usage, row["export_created_at"], row["call"])
                found.setdefault(export.id, export)  # of several with one name, the latest
        return [found[id_] for id_ in sorted(found)]

    async def _generations(self, query: sa.Select[tuple[object, ...]]) -> list[Generation]:
        async with reading(self.engine) as connection:
            rows: Iterable[sa.RowMapping] = (await connection.execute(query)).mappings().all()
        return [_generation(row) for row in rows]


def _exported(call: sa.ColumnElement[int]) -> sa.Select[tuple[object, ...]]:
    columns = (U.c.id.label("row"), U.c.usage.label("export_usage"), U.c.created_at.label("export_created_at"))
    return sa.select(G, *columns, call.label("call"))


def _generation(row: sa.RowMapping) -> Generation:
    return Generation(**{name: row[name] for name in Generation.__struct_fields__})
