"""The price book in SQL: rows are added and withdrawn, never changed, and every change is a revision."""

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from services.billing.adapters.database import reading, writing
from services.billing.adapters.tables import GENERATIONS as G
from services.billing.adapters.tables import PRICE_REVISIONS, PRICE_WITHDRAWALS, PRICES, RESETTLEMENTS, STATE
from services.billing.core.prices import Price, PriceBook

__all__ = ["FILE", "SHIPPED", "Change", "KeptPrice", "Prices"]


FILE: Final = "file"
"""Source of the price file named in the settings."""
SHIPPED: Final = "shipped"
"""Source of the prices shipped with Tailrace."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """The effect of a new price book or, on a dry run, the expected effect.

    ``revision``: the one in force afterwards. ``resettled``: ended generations that the change may concern.
    """

    revision: int
    added: int
    withdrawn: int
    kept: int
    resettled: int
    dry_run: bool


class KeptPrice(msgspec.Struct, frozen=True, kw_only=True):
    """A row with the revision that added it and, if it is no longer valid, the one that withdrew it."""

    price: Price
    revision: int
    withdrawn: int | None


class _DryRun(Exception):
    """Roll back the transaction of a dry run."""


class Prices:
    """Read and write the price book. Every method raises ``LedgerUnavailable`` when the database does not answer."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert

    async def book(self, known: PriceBook | None = None) -> PriceBook:
        """Return the current rows and their revision; ``known`` itself if it has that revision."""
        async with reading(self.engine) as connection:
            revision = await _revision(connection)
            if known is not None and known.revision == revision:
                return known
            return PriceBook(revision, await _present(connection))

    async def history(self) -> list[KeptPrice]:
        """Return every row ever stored, in the order of addition."""
        query = (
            sa.select(PRICES, PRICE_WITHDRAWALS.c.revision.label("withdrawn"))
            .outerjoin(PRICE_WITHDRAWALS, PRICE_WITHDRAWALS.c.price == PRICES.c.id)
            .order_by(PRICES.c.id)
        )
        async with reading(self.engine) as connection:
            rows = (await connection.execute(query)).mappings().all()
        return [KeptPrice(price=_price(r), revision=r["revision"], withdrawn=r["withdrawn"]) for r in rows]

    async def last_digest(self, source: str) -> str | None:
        """Return the digest of the last price book from a source."""
        query = (
            sa.select(PRICE_REVISIONS.c.digest)
            .where(PRICE_REVISIONS.c.source == source)
            .order_by(PRICE_REVISIONS.c.revision.desc())
            .limit(1)
        )
        async with reading(self.engine) as connection:
            digest: str | None = (await connection.execute(query)).scalar()
        return digest

    async def put(
        self, wanted: Sequence[Price], *, source: str, digest: str, now: int, dry_run: bool = False
    ) -> Change:
        """Replace the price book by ``wanted``; equal rows stay the same rows.

        Ended generations that the change may concern are queued for settlement.
        """
        change: Change | None = None
        try:
            async with writing(self.engine) as connection:
                change = await self._put(connection, wanted, source, digest, now, dry_run=dry_run)
                if dry_run:
                    raise _DryRun
        except _DryRun:
            pass
        assert change is not None
        return change

    async def ship(self, wanted: Sequence[Price], *, digest: str, now: int) -> Change | None:
        """Make ``wanted`` the price book, unless there is one from another source; then return ``None``."""
        async with writing(self.engine) as connection:
            await _revision(connection, lock=True)
            if await _owned(connection):
                return None
            return await self._put(connection, wanted, SHIPPED, digest, now, dry_run=False)

    async def _put(
        self, connection: AsyncConnection, wanted: Sequence[Price], source: str, digest: str, now: int, *, dry_run: bool
    ) -> Change:
        # Locked to the end: a batch reads this row too, so each is priced by the old book or the new one, never both.
        before = await _revision(connection, lock=True)
        present = await _present(connection)
        ours = {p.content() for p in wanted}
        theirs = {p.content() for p in present}
        added = [p for p in wanted if p.content() not in theirs]
        withdrawn = [p for p in present if p.content() not in ours]
        # A loaded file is recorded even without changes, so that it is not loaded again. So is the user's
        # first own book: the shipped prices never replace it.
        claims = source == FILE or (source != SHIPPED and not await _owned(connection))
        differs = bool(added or withdrawn or claims)
        revision = before + differs
        resettled = 0
        if differs:
            await connection.execute(sa.update(STATE).where(STATE.c.name == "prices").values(value=revision))
            await connection.execute(
                sa.insert(PRICE_REVISIONS).values(revision=revision, source=source, digest=digest, created_at=now)
            )
            await _write(connection, added, withdrawn, revision)
            resettled = await self._ask(connection, [*added, *withdrawn])
        return Change(
            revision=revision,
            added=len(added),
            withdrawn=len(withdrawn),
            kept=len(present) - len(withdrawn),
            resettled=resettled,
            dry_run=dry_run,
        )

    async def _ask(self, connection: AsyncConnection, changed: Sequence[Price]) -> int:
        """Queue ended generations for settlement; return their number."""
        if not changed:
            return 0
        concerned = sa.and_(G.c.pricing.in_(("charged", "unpriced")), sa.or_(*_conditions(changed)))
        place = ("tenant", "session", "generation", "partition")
        asked = await connection.execute(
            self._insert(RESETTLEMENTS)
            .from_select(list(place), sa.select(*(G.c[name] for name in place)).where(concerned))
            .on_conflict_do_nothing()
        )
        return asked.rowcount


async def _revision(connection: AsyncConnection, *, lock: bool = False) -> int:
    query = sa.select(STATE.c.value).where(STATE.c.name == "prices")
    return int((await connection.execute(query.with_for_update() if lock else query)).scalar_one())


async def _owned(connection: AsyncConnection) -> bool:
    """Return whether the price book has ever come from another source than Tailrace itself."""
    others = sa.select(PRICE_REVISIONS.c.revision).where(PRICE_REVISIONS.c.source != SHIPPED)
    return bool((await connection.execute(sa.select(sa.exists(others)))).scalar_one())


async def _present(connection: AsyncConnection) -> list[Price]:
    gone = sa.select(PRICE_WITHDRAWALS.c.price)
    rows = await connection.execute(sa.select(PRICES).where(PRICES.c.id.not_in(gone)).order_by(PRICES.c.id))
    return [_price(row) for row in rows.mappings()]


async def _write(connection: AsyncConnection, added: Sequence[Price], gone: Sequence[Price], revision: int) -> None:
    if added:
        rows = [{n: v for n, v in msgspec.structs.asdict(p).items() if n != "id"} for p in added]
        await connection.execute(sa.insert(PRICES), [{**row, "revision": revision} for row in rows])
    if gone:
        await connection.execute(sa.insert(PRICE_WITHDRAWALS), [{"price": p.id, "revision": revision} for p in gone])


def _price(row: sa.RowMapping) -> Price:
    return Price(**{name: row[name] for name in Price.__struct_fields__})


def _conditions(changed: Iterable[Price]) -> list[sa.ColumnElement[bool]]:
    """Return conditions that select the generations a change may concern; selecting too many is harmless."""
    spans: dict[tuple[str, str], tuple[int, int | None]] = {}
    for p in changed:
        start, end = spans.get((p.provider, p.model), (p.valid_from, p.valid_until))
        last = None if end is None or p.valid_until is None else max(end, p.valid_until)
        spans[p.provider, p.model] = (min(start, p.valid_from), last)
    model = sa.func.coalesce(sa.func.nullif(G.c.upstream_model, ""), G.c.model)
    return [
        sa.and_(
            G.c.provider.like(_like(provider), escape="\\"),
            model.like(_like(name), escape="\\"),
            G.c.started_at >= start,
            sa.true() if end is None else G.c.started_at < end,
        )
        for (provider, name), (start, end) in spans.items()
    ]


def _like(pattern: str) -> str:
    escaped = "".join(f"\\{c}" if c in "\\%_" else c for c in pattern)
    return escaped.replace("*", "%").replace("?", "_")
