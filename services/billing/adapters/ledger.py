"""The ledger: generations and positions in SQL.

A batch is one transaction. It first moves the partition's position from the value this process expects, under this
process's hold. If no row matches, another process has moved it and nothing is written: this fence makes two concurrent
processes safe, whatever their clocks. The time of the hold only spares them wasted work.
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
"""Milliseconds without an event after which a generation is assumed to have ended in a gap: twice the longest answer.
"""


class LogPosition(NamedTuple):
    """A partition's position: the log's incarnation, the last applied stream sequence, and the storage time of that
    message.

    ``stamp``: in nanoseconds since 1970, 0 if unknown.
    """

    incarnation: str
    applied: int
    stamp: int


class Ledger:
    """The database port of the consumer. ``holder`` names this process; ``hold``: its length in seconds."""

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
        """Take or renew the hold on a partition and return its applied stream sequence.

        ``None`` while another process holds it. ``now`` in milliseconds since 1970. The position of another incarnation
        of the log is reset to 0, and generations that had not ended are folded again from their beginning. ``base`` and
        ``lost``: the log had reached ``lost`` before, but holds the same messages only up to ``base``.

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
        """Return a partition's position under any holder; ``None`` before the first hold.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        query = sa.select(P.c.incarnation, P.c.applied, P.c.stamp).where(P.c.partition == partition)
        async with reading(self.engine) as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else LogPosition(*row)

    async def release(self, partition: int) -> None:
        """Release the hold, so that another process need not wait for its expiry.

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
        """Move the position from the first to the second of ``applied`` and write generations, atomically.

        ``stamp``: storage time of the message at the new position (0: unknown). Of ``progress`` only position and
        running count are written; those rows exist. Returns the settlements that used more than their reservation.

        Raises:
            Fenced: the position or the hold is not what this process expects; nothing is written.
            StalePrices: the price book has another revision than ``money`` was computed with; nothing is written.
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
        """Check the price book's revision, and lock it until the transaction ends."""
        query = sa.select(STATE.c.value).where(STATE.c.name == "prices").with_for_update(read=True)
        if (await connection.execute(query)).scalar_one() != revision:
            raise StalePrices(revision)

    def _until(self, now: int) -> int:
        return now + round(self.hold * 1_000)

    async def load(self, keys: Sequence[Key]) -> dict[Key, Generation]:
        """Return the generations with these keys that exist.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        async with reading(self.engine) as connection:
            return {g.key: g for g in await self._bulk.known(connection, keys)}

    async def note_gap(self, partition: int, incarnation: str, gap: tuple[int, int], now: int) -> None:
        """Record that the log no longer had the stream sequences from the first to the last of ``gap``.

        Generations that were running before it are checked again `UNHEARD` after ``now``: they may have ended in the
        gap.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        first, last = gap
        row = {"partition": partition, "incarnation": incarnation, "first": first, "last": last, "noticed_at": now}
        async with writing(self.engine) as connection:
            await connection.execute(self._insert_gap, row)
        await self.watch_unheard(partition, last, now)

    async def watch_unheard(self, partition: int, lost: int, now: int) -> None:
        """Schedule a check, `UNHEARD` after ``now``, of running generations without an event after ``lost``.

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
        """Return the last stream sequence known to have expired unread; 0 if none has.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        query = sa.select(sa.func.max(GAPS.c.last)).where(
            GAPS.c.partition == partition, GAPS.c.incarnation == incarnation
        )
        async with reading(self.engine) as connection:
            return int((await connection.execute(query)).scalar_one() or 0)

    async def running(self) -> int:
        """Return the number of running generations in the ledger.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        async with reading(self.engine) as connection:
            found = await connection.execute(sa.select(sa.func.count()).select_from(G).where(G.c.status == "running"))
            return int(found.scalar_one())

    async def answers(self) -> bool:
        """Return True when the database answers.

        Raises:
            LedgerUnavailable: the database did not answer.
        """
        async with reading(self.engine) as connection:
            await connection.execute(sa.select(sa.literal(1)))
            return True
