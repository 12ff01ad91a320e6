"""Provider exports in SQL: each row is stored once, and applied by the holder of its generation's partition."""

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Final, NamedTuple

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from services.billing.adapters.database import reading, writing
from services.billing.adapters.tables import CALLS as C
from services.billing.adapters.tables import GENERATIONS as G
from services.billing.adapters.tables import PROVIDER_USAGE as U
from services.billing.core.fold import take_export
from services.billing.core.generation import Generation, Key
from services.billing.core.money import ZERO
from services.billing.core.provider_export import ExportRow
from services.billing.core.settlement import Terms, settle

__all__ = ["Imported", "Imports"]

AT_ONCE: Final = 500


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """The result of importing an export or, on a dry run, the expected result.

    ``repeated`` rows were already stored. Of the new ones, ``matched`` have a generation; the others wait for theirs.
    ``corrections``: the number of generations whose amount changes, by current prices; ``difference``: the change by
    currency. A real import computes the same, but the entries follow moments later, when the rows are applied.
    """

    rows: int
    new: int
    repeated: int
    matched: int
    corrections: int
    difference: dict[str, Decimal]
    dry_run: bool


class Meant(NamedTuple):
    """The target of a row: a generation, and the number of its call (0: the last one)."""

    generation: Generation
    call: int


class Imports:
    """Store rows of exports. Every method raises ``LedgerUnavailable`` when the database does not answer."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert

    async def put(
        self, tenant: str, rows: Sequence[ExportRow], *, source: str, now: int, terms: Terms, dry_run: bool = False
    ) -> Imported:
        """Store the new rows, all or none; ``now`` in milliseconds since 1970."""
        distinct = {row.digest: row for row in rows}
        known: set[str] = set()
        found: dict[str, Meant] = {}
        async with reading(self.engine) as connection:
            for some in _chunks(list(distinct.values())):
                digests = await connection.execute(
                    sa.select(U.c.digest).where(U.c.tenant == tenant, U.c.digest.in_([r.digest for r in some]))
                )
                known |= set(digests.scalars())
                found |= await _matching(connection, tenant, some)
        new = [row for row in distinct.values() if row.digest not in known]
        difference = _difference(new, found, now, terms)
        if not dry_run and new:
            await self._keep(tenant, new, source, now)
        return Imported(
            rows=len(rows),
            new=len(new),
            repeated=len(rows) - len(new),
            matched=sum(row.digest in found for row in new),
            corrections=len(difference),
            difference=_sums(difference),
            dry_run=dry_run,
        )

    async def _keep(self, tenant: str, rows: Iterable[ExportRow], source: str, now: int) -> None:
        statement = self._insert(U).on_conflict_do_nothing(index_elements=["tenant", "digest"])
        values = [
            {
                "tenant": tenant,
                "digest": row.digest,
                "provider": row.provider,
                "generation": row.generation,
                "upstream_id": row.upstream_id,
                "usage": msgspec.json.encode(row.usage).decode(),
                "source": source,
                "created_at": now,
            }
            for row in rows
        ]
        async with writing(self.engine) as connection:
            await connection.execute(statement, values)

    async def waiting(self, tenant: str) -> int:
        """Return the number of rows not applied yet."""
        query = sa.select(sa.func.count()).select_from(U).where(U.c.tenant == tenant, U.c.applied_at.is_(None))
        async with reading(self.engine) as connection:
            return int((await connection.execute(query)).scalar_one())


async def _matching(connection: AsyncConnection, tenant: str, rows: Sequence[ExportRow]) -> dict[str, Meant]:
    """Return the targets of rows, by the rows' digests."""
    names = [r.generation for r in rows if r.generation]
    ids = [r.upstream_id for r in rows if not r.generation]
    conditions = [G.c.generation.in_(names), sa.and_(G.c.upstream_id.in_(ids), G.c.upstream_id != "")]
    query = sa.select(G).where(G.c.tenant == tenant, sa.or_(*conditions)).order_by(G.c.started_at)
    found = [Generation(**row) for row in (await connection.execute(query)).mappings()]
    by_name: Mapping[str, Meant] = {g.generation: Meant(g, 0) for g in found}  # of several with one name, the latest
    by_id = await _calls(connection, tenant, ids)
    by_id |= {g.upstream_id: Meant(g, 0) for g in found if g.upstream_id}
    meant = {r.digest: by_name.get(r.generation) if r.generation else by_id.get(r.upstream_id) for r in rows}
    return {digest: one for digest, one in meant.items() if one is not None}


async def _calls(connection: AsyncConnection, tenant: str, ids: Sequence[str]) -> dict[str, Meant]:
    """Return the abandoned calls with these upstream ids."""
    same = sa.and_(*(C.c[name] == G.c[name] for name in Key._fields))
    query = sa.select(G, C.c.upstream_id.label("name"), C.c.number.label("call")).join(C, same)
    query = query.where(C.c.tenant == tenant, C.c.upstream_id.in_(ids)).order_by(G.c.started_at)
    fields = Generation.__struct_fields__
    return {
        row["name"]: Meant(Generation(**{name: row[name] for name in fields}), row["call"])
        for row in (await connection.execute(query)).mappings()
    }


def _difference(
    rows: Iterable[ExportRow], found: Mapping[str, Meant], now: int, terms: Terms
) -> list[tuple[str, Decimal]]:
    """Return the change of each generation's amount; of several rows for a call the last one counts."""
    reported: dict[Key, Generation] = {}
    for row in rows:
        if row.digest in found and (meant := found[row.digest]).generation.ended:
            g = reported.get(meant.generation.key) or msgspec.structs.replace(meant.generation)
            take_export(g, meant.call, row.usage)
            reported[g.key] = g
    changes: list[tuple[str, Decimal]] = []
    for g in reported.values():
        _, entries = settle(g, now, terms)
        changes += [(entry.currency, entry.amount) for entry in entries]
    return changes


def _sums(changes: Iterable[tuple[str, Decimal]]) -> dict[str, Decimal]:
    sums: dict[str, Decimal] = {}
    for currency, amount in changes:
        sums[currency] = sums.get(currency, ZERO) + amount
    return sums


def _chunks(rows: Sequence[ExportRow]) -> Iterable[Sequence[ExportRow]]:
    return (rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE))
