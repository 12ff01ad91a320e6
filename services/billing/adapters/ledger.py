"""The ledger: generations and positions in SQL.

A batch is one transaction. It first moves the partition's position from where this process believes it to be, under
this process's hold; when that matches no row, somebody else has moved it, and nothing is written. That is what makes
two processes at once safe, whatever their clocks say. The time of the hold only saves them from working in vain.
"""

from collections.abc import Collection, Sequence
from decimal import Decimal
from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from services.billing.adapters.bulk import BulkWriter
from services.billing.adapters.database import reading, writing
from services.billing.adapters.sums import Sums
from services.billing.adapters.tables import GAPS, STATE
from services.billing.adapters.tables import GENERATIONS as G
from services.billing.adapters.tables import PARTITIONS as P
from services.billing.adapters.worklist import Money, finish
from services.billing.core.budgets import Overrun, overruns
from services.billing.core.generation import Generation, Key
from services.billing.errors import Fenced, StalePrices

__all__ = ["Ledger"]


UNHEARD: Final = 2 * 3_600_000
"""Milliseconds without an event after which a generation is taken to have ended in a gap: twice the longest answer."""


class Ledger:
    """The database as the consumer needs it. ``holder`` names this process; ``hold``: its length in seconds."""

    def __init__(self, engine: AsyncEngine, holder: str, *, hold: float = 5.0) -> None:
        self.engine = engine
        self.holder = holder
        self.hold = hold
        insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
        self._bulk = BulkWriter(engine.dialect.name)
        self._sums = Sums(engine.dialect.name)
        self._insert_gap = insert(GAPS).on_conflict_do_nothing()
        self._insert_partition = insert(P).on_conflict_do_nothing(index_elements=["partition"])

    async def acquire(self, partition: int, incarnation: str, now: int) -> int | None:
        """Take or renew the hold on a partition and return the stream sequence up to which it is applied.

        ``None`` while another process holds it. The position of another incarnation of the stream is set to 0.
        ``now`` in milliseconds since 1970.

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
            await connection.execute(
                sa.update(P)
                .where(P.c.partition == partition, P.c.incarnation != incarnation)
                .values(incarnation=incarnation, applied=0)
            )
            found = await connection.execute(sa.select(P.c.applied).where(P.c.partition == partition))
            return int(found.scalar_one())

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
    ) -> list[Overrun]:
        """Move the position from the first to the second of ``applied`` and write generations: all of it or nothing.

        Of ``progress`` only position and running count are written; those rows exist. Returns the settlements that
        used more than was reserved for them.

        Raises:
            Fenced: position or hold are not what this process believes; nothing is written.
            StalePrices: the price book has another revision than ``money`` was reckoned by; nothing is written.
            LedgerUnavailable: the database did not answer. It may be written nevertheless.
        """
        before, after = applied
        reserved: dict[Key, dict[str, Decimal]] = {}
        async with writing(self.engine) as connection:
            moved = await connection.execute(
                sa.update(P)
                .where(P.c.partition == partition, P.c.holder == self.holder, P.c.applied == before)
                .values(applied=after, held_until=self._until(now))
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
            await connection.execute(
                sa.update(G)
                .where(G.c.partition == partition, G.c.status == "running", G.c.log_seq <= last)
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
