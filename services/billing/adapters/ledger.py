"""The ledger: generations and positions in SQL.

A batch is one transaction. It first moves the partition's position from where this process believes it to be, under
this process's hold; when that matches no row, somebody else has moved it, and nothing is written. That is what makes
two processes at once safe, whatever their clocks say. The time of the hold only saves them from working in vain.
"""

from collections.abc import Collection, Sequence
from decimal import Decimal
from typing import Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from services.billing.adapters.bulk import BulkWriter
from services.billing.adapters.database import reading, writing
from services.billing.adapters.sums import SpendingWriter
from services.billing.adapters.tables import GAPS, STATE
from services.billing.adapters.tables import GENERATIONS as G
from services.billing.adapters.tables import PARTITIONS as P
from services.billing.adapters.worklist import Money, finish
from services.billing.core.budgets import Overrun, overruns
from services.billing.core.generation import Generation, Key
from services.billing.errors import Fenced, StalePrices

__all__ = ["Ledger", "LogPosition"]


UNHEARD: Final = 2 * 3_600_000
"""Milliseconds without an event after which a generation is taken to have ended in a gap: twice the longest answer."""


class LogPosition(NamedTuple):
    """A partition's position: the log's incarnation, the last applied stream sequence, and when that was stored.

    ``stamp``: in nanoseconds since 1970, 0 where it is not known.
    """

    incarnation: str
    applied: int
    stamp: int


class Ledger:
    """The database as the consumer needs it. ``holder`` names this process; ``hold``: its length in seconds."""

    def __init__(self, engine: AsyncEngine, holder: str, *, hold: float = 5.0) -> None:
        self.engine = engine
        self.holder = holder
        self.hold = hold
        insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
        self._bulk = BulkWriter(engine.dialect.name)
        self._sums = SpendingWriter(engine.dialect.name)
        gap = insert(GAPS)
        self._insert_gap = gap.on_conflict_do_update(
            index_elements=list(GAPS.primary_key),
            set_={"last": gap.excluded.last},
            where=gap.excluded.last > GAPS.c.last,
        )
        self._insert_partition = insert(P).on_conflict_do_nothing(index_elements=["partition"])

    async def acquire(self, partition: int, incarnation: str, now: int, *, base: int = 0, lost: int = 0) -> int | None:
        """Take or renew the hold on a partition and return the stream sequence up to which it is applied.

        ``None`` while another process holds it. ``now`` in milliseconds since 1970. The position of another incarnation
        of the log is set to 0, and generations that had not ended are folded from their beginning again. ``base`` and
        ``lost``: the log is known to have reached ``lost`` before, and holds what it held only up to ``base``.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        async with writing(self.engine) as connection:
            await connection.execute(
                self._insert_partition.values(partition=partition, incarnation=incarnation, applied=0, held_until=0)
            )
            taken = await connection.execute(
                sa.update(P)
                .where(P.c.partition == partition)
                .where(sa.or_(P.c.holder.is_(None), P.c.holder == self.holder, P.c.held_until < now))
                .values(holder=self.holder, held_until=self._until(now))
            )
            if taken.rowcount != 1:
                return None
            query = sa.select(P.c.incarnation, P.c.applied).where(P.c.partition == partition)
            before, applied = (await connection.execute(query)).one()
            if before == incarnation:
                return int(applied)
            await connection.execute(
                sa.update(P).where(P.c.partition == partition).values(incarnation=incarnation, applied=0, stamp=0)
            )
            again: dict[str, int | None] = {"epoch": 0, "next_seq": 0, "log_seq": 0, "settle_at": None}
            last = max(applied, lost)
            if last > base:
                gap = {"first": base + 1, "last": last, "noticed_at": now}
                await connection.execute(self._insert_gap, {"partition": partition, "incarnation": incarnation} | gap)
            await connection.execute(
                sa.update(G).where(G.c.partition == partition, G.c.status == "running").values(**again)
            )
            return 0

    async def position(self, partition: int) -> LogPosition | None:
        """Return a partition's position, whoever holds it; ``None`` before anybody has.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        query = sa.select(P.c.incarnation, P.c.applied, P.c.stamp).where(P.c.partition == partition)
        async with reading(self.engine) as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else LogPosition(*row)

    async def release(self, partition: int) -> None:
        """Give up the hold, so that another process need not wait for its end.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        async with writing(self.engine) as connection:
            await connection.execute(
                sa.update(P).where(P.c.partition == partition, P.c.holder == self.holder).values(holder=None)
            )

    async def commit(
        self,
        partition: int,
        applied: tuple[int, int],
        now: int,
        whole: Collection[Generation] = (),
        progress: Collection[Generation] = (),
        money: Money | None = None,
        *,
        stamp: int = 0,
    ) -> list[Overrun]:
        """Move the position from the first to the second of ``applied`` and write generations: all of it or nothing.

        ``stamp``: when the message at the new position was stored (0: not known). Of ``progress`` only position and
        running count are written; those rows exist. Returns the settlements that used more than was reserved for them.

        Raises:
            Fenced: position or hold are not what this process believes; nothing is written.
            StalePrices: the price book has another revision than ``money`` was reckoned by; nothing is written.
            LedgerUnavailable: the database did not answer. It may be written nevertheless.
        """
        before, after = applied
        moved_to = {} if before == after else {"applied": after, "stamp": stamp}
        reserved: dict[Key, dict[str, Decimal]] = {}
        async with writing(self.engine) as connection:
            moved = await connection.execute(
                sa.update(P)
                .where(P.c.partition == partition, P.c.holder == self.holder, P.c.applied == before)
                .values(held_until=self._until(now), **moved_to)
            )
            if moved.rowcount != 1:
                raise Fenced(partition)
            if money is not None:
                await self._check(connection, money.revision)
                await self._bulk.entries(connection, money.entries)
                await finish(connection, money, now)
                reserved = await self._sums.apply(connection, money.spending, money.released)
            await self._bulk.generations(connection, whole)
            await self._bulk.progress(connection, progress)
        return overruns(whole, reserved) if reserved else []

    @staticmethod
    async def _check(connection: AsyncConnection, revision: int) -> None:
        """See that the price book is the one reckoned by, and keep it from changing until the transaction ends."""
        query = sa.select(STATE.c.value).where(STATE.c.name == "prices").with_for_update(read=True)
        if (await connection.execute(query)).scalar_one() != revision:
            raise StalePrices(revision)

    def _until(self, now: int) -> int:
        return now + round(self.hold * 1_000)

    async def load(self, keys: Sequence[Key]) -> dict[Key, Generation]:
        """Return those of the named generations that are known.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        async with reading(self.engine) as connection:
            return {g.key: g for g in await self._bulk.known(connection, keys)}

    async def note_gap(self, partition: int, incarnation: str, gap: tuple[int, int], now: int) -> None:
        """Keep that the log no longer had the stream sequences from the first to the last of ``gap``.

        Generations that were running before it are looked at again `UNHEARD` after ``now``: they may have ended there.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        first, last = gap
        row = {"partition": partition, "incarnation": incarnation, "first": first, "last": last, "noticed_at": now}
        async with writing(self.engine) as connection:
            await connection.execute(self._insert_gap, row)
        await self.watch_unheard(partition, last, now)

    async def watch_unheard(self, partition: int, lost: int, now: int) -> None:
        """Have generations looked at again, `UNHEARD` after ``now``, of which nothing behind ``lost`` was read.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        async with writing(self.engine) as connection:
            await connection.execute(
                sa.update(G)
                .where(G.c.partition == partition, G.c.status == "running", G.c.log_seq <= lost)
                .where(G.c.settle_at.is_(None))
                .values(settle_at=now + UNHEARD)
            )

    async def lost(self, partition: int, incarnation: str) -> int:
        """Return the last stream sequence that is known to have expired unread; 0 where none has.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        query = sa.select(sa.func.max(GAPS.c.last)).where(
            GAPS.c.partition == partition, GAPS.c.incarnation == incarnation
        )
        async with reading(self.engine) as connection:
            return int((await connection.execute(query)).scalar_one() or 0)

    async def running(self) -> int:
        """Return how many generations run, as far as the ledger knows.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        async with reading(self.engine) as connection:
            found = await connection.execute(sa.select(sa.func.count()).select_from(G).where(G.c.status == "running"))
            return int(found.scalar_one())

    async def answers(self) -> bool:
        """Return true.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        async with reading(self.engine) as connection:
            await connection.execute(sa.select(sa.literal(1)))
            return True
