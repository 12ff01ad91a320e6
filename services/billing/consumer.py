"""Consume one partition of the log into the ledger.

There is one way to recover from any error: drop the memory and restart from the position in the database. The position
moves in the transaction that writes the rows, over the log in order and without holes. So a crash at any point, a
redelivery, a lost acknowledgement and a second process cost time but never change a number. The durable consumer
signals new events and the backlog; events that it does not deliver in order are read from the log directly.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import structlog
import tenacity

from services.billing import metrics
from services.billing.adapters.budgets import Budgets
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.tail import Pulled, Tail
from services.billing.adapters.worklist import Money
from services.billing.continuity import Continuity
from services.billing.core.batch import Batch, Group, fold_batch, group
from services.billing.core.fold import joins_late
from services.billing.core.generation import Generation, Key
from services.billing.core.intake import Record
from services.billing.core.sequence import holes, join
from services.billing.core.settlement import Terms
from services.billing.core.spending import released, steps
from services.billing.errors import Fenced, LedgerUnavailable, LedgerUnusable, StalePrices
from services.billing.overruns import report_overruns
from services.billing.sweep import Sweep, notify
from services.billing.terms import CurrentTerms
from services.kit.clock import Clock
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.shutdown import end

__all__ = ["Consumer"]

log = structlog.get_logger()
CACHED: Final = 50_000
"""Bound of running generations cached between batches; others are loaded with their next event."""
SWEEP_SECONDS: Final = 2.0
_BACKOFF: Final = tenacity.wait_random_exponential(multiplier=0.2, max=5.0)
_PAUSE: Final = 0.5
RELEASE_SECONDS: Final = 1.0
"""Timeout for releasing the hold; afterwards it expires by itself."""


class Consumer:
    """Follow one partition while this process holds it; otherwise wait to take over."""

    def __init__(self, partition: int, tail: Tail, ledger: Ledger, terms: CurrentTerms, clock: Clock) -> None:
        self.partition = partition
        self.tail = tail
        self.ledger = ledger
        self.terms = terms
        self.sweep = Sweep(partition, ledger, terms)
        self.continuity = Continuity(partition, tail, ledger)
        self.clock = clock
        self._budgets = Budgets(ledger.engine)
        self.applied = -1
        self.incarnation = ""
        self._read_up_to = 0
        self._lost = 0
        self._running: OrderedDict[Key, Generation] = OrderedDict()
        self._renewed = 0.0
        self._swept = 0.0
        self._stop = asyncio.Event()
        self._lag = metrics.LAG.labels(str(partition))
        self._position = metrics.POSITION.labels(str(partition))

    async def run(self, stop: asyncio.Event) -> None:
        """Consume until ``stop`` is set; then finish the current batch and release the hold."""
        self._stop = stop
        await self.tail.open()
        try:
            while not stop.is_set():
                await self._once()
        finally:
            await self._release()

    async def _once(self) -> None:
        try:
            held: bool = await self._retrying(self._begin)
            if held:
                await self._follow()
            else:
                await self._pause(self.ledger.hold / 3)
        except (BrokerUnavailable, LedgerUnavailable, Fenced) as error:
            if not self._stop.is_set():
                log.warning("begins again", partition=self.partition, error=str(error))
                await self._pause(_PAUSE)

    @property
    def _retrying(self) -> tenacity.AsyncRetrying:
        return tenacity.AsyncRetrying(
            wait=_BACKOFF,
            sleep=self._pause,
            stop=lambda _state: self._stop.is_set(),
            retry=tenacity.retry_if_exception_type((BrokerUnavailable, LedgerUnavailable)),
            before_sleep=self._stalled,
            reraise=True,
        )

    def _stalled(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        part = "database" if isinstance(error, LedgerUnavailable) else "broker"
        metrics.STALLS.labels(part).inc()
        log.warning("waits", partition=self.partition, part=part, attempt=state.attempt_number, error=str(error))

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return

    async def _begin(self) -> bool:
        """Take the partition at the position in the database; return False while another process holds it."""
        await self.terms.refresh()
        begun = await self.continuity.begin(self._now())
        if begun is None:
            return False
        if (self.incarnation, self.applied) != (begun.incarnation, begun.applied):
            self._running.clear()
        self.incarnation, self.applied, self._read_up_to = begun
        self._renewed = self.clock.monotonic()
        self._lost = await self.ledger.lost(self.partition, self.incarnation)
        return True

    async def _release(self) -> None:
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                await self.ledger.release(self.partition)
        except (LedgerUnavailable, LedgerUnusable, TimeoutError) as error:
            log.warning("hold not released, it expires by itself", partition=self.partition, error=str(error))

    async def _follow(self) -> None:
        # Events delivered to a process that died are redelivered late, after newer ones: read them from the log now.
        await self._catch_up(self._read_up_to)
        if self._lost:  # also after a crash between noting the gap and scheduling the check
            await self.ledger.watch_unheard(self.partition, self._lost, self._now())
        ahead: asyncio.Task[Pulled] | None = None
        try:
            while not self._stop.is_set():
                pulled = await (ahead or self.tail.pull())
                # If more events wait, pull while this batch is written: one pull ahead, at most two batches in memory.
                ahead = asyncio.create_task(self.tail.pull()) if pulled.full else None
                is_same_log = await self._take(pulled)
                await self._renew()
                await self._sweep()
                if pulled.doubtful or not is_same_log or not await self._poll_log():
                    return
        finally:
            if ahead is not None:
                await end(ahead)

    async def _take(self, pulled: Pulled) -> bool:
        """Apply and acknowledge a pull; return False if the stream has been recreated."""
        joined = join(self.applied, pulled.records())
        if joined.repeats:
            metrics.REPEATS.inc(joined.repeats)
            # A recreated stream counts from 1 again: its events would look like repeats.
            if (await self.tail.state()).incarnation != self.incarnation:
                return False
        if joined.read_up_to is not None:
            await self._catch_up(joined.read_up_to)
        elif joined.ready:
            await self._apply(joined.ready, joined.ready[-1].seq)
        await self.tail.acknowledge(pulled)
        if pulled.pending is not None:
            self._lag.set(pulled.pending)
        elif not pulled.doubtful:
            self._lag.set(0)
        return True

    async def _poll_log(self) -> bool:
        """Read events that the consumer does not deliver; return False if the log has another incarnation."""
        read_up_to = await self.continuity.poll(self.incarnation, self.applied, self.clock.monotonic())
        if read_up_to:
            await self._catch_up(read_up_to)
        return read_up_to != 0

    async def _catch_up(self, last: int) -> None:
        """Apply the events in the log up to the stream sequence ``last``."""
        if last <= self.applied:
            return
        first = self.applied + 1
        count = 0
        async for records in self.tail.between(first, last):
            for before, after in holes(self.applied, records):
                await self._record_gap(before, after)
            count += len(records)
            await self._apply(records, records[-1].seq)
        await self._record_gap(self.applied + 1, last)
        if self.applied < last:
            await self._apply([], last)
        log.info("caught up from the log", partition=self.partition, first=first, last=last, kept=count)

    async def _record_gap(self, first: int, last: int) -> None:
        """Record the stream sequences from ``first`` to ``last`` as a gap, unless the range is empty."""
        if first > last:
            return
        log.warning("events had expired or were lost unread", partition=self.partition, first=first, last=last)
        metrics.GAP.labels(str(self.partition)).inc(last - first + 1)
        await self.ledger.note_gap(self.partition, self.incarnation, (first, last), self._now())
        self._lost = max(self._lost, last)

    async def _apply(self, records: Sequence[Record], up_to: int) -> None:
        started = self.clock.monotonic()
        now = self._now()
        groups, strays = group(records)
        known = await self._known(groups)
        late = [one for one in groups if joins_late(known.get(one.key), one.records, self._lost)]
        highest = await self.tail.highest_epochs(late)
        stamp = records[-1].stamp if records and records[-1].seq == up_to else 0
        batch = await self._commit(groups, known, now, (up_to, stamp), highest)
        batch.verdicts["malformed"] += strays
        self.applied = up_to
        self._renewed = self.clock.monotonic()
        self._remember(batch.whole)
        self._remember(batch.progress)
        notify(batch.whole, known, batch.entries)
        for verdict, count in batch.verdicts.items():
            metrics.EVENTS.labels(verdict).inc(count)
        metrics.ROWS.labels("whole").inc(len(batch.whole))
        metrics.ROWS.labels("progress").inc(len(batch.progress))
        metrics.BATCH_SECONDS.observe(self.clock.monotonic() - started)
        self._position.set(up_to)

    async def _commit(
        self,
        groups: Sequence[Group],
        known: Mapping[Key, Generation],
        now: int,
        reached: tuple[int, int],
        highest: Mapping[Key, int],
    ) -> Batch:
        """Fold, settle and write a batch; repeat with new prices if they changed meanwhile."""
        terms = self.terms.now
        while True:
            batch = fold_batch(groups, known, now, terms, self._lost, highest)
            ended = any(g.ended for g in batch.whole)
            money = _money(terms, batch, known) if ended else None
            try:
                up_to, stamp = reached
                position = (self.applied, up_to)
                over = await self.ledger.commit(
                    self.partition, position, now, batch.whole, batch.progress, money, stamp=stamp
                )
                await report_overruns(self._budgets, over)
                return batch
            except StalePrices:
                terms = await self.terms.refresh()

    async def _known(self, groups: Iterable[Group]) -> dict[Key, Generation]:
        known: dict[Key, Generation] = {}
        missing: list[Key] = []
        for key in (g.key for g in groups):
            found = self._running.get(key)
            if found is None:
                missing.append(key)
            else:
                known[key] = found
        if missing:
            known |= await self.ledger.load(missing)
        return known

    def _remember(self, generations: Collection[Generation]) -> None:
        for g in generations:
            if g.ended:
                self._running.pop(g.key, None)
            else:
                self._running[g.key] = g
                self._running.move_to_end(g.key)
        while len(self._running) > CACHED:
            self._running.popitem(last=False)

    async def _renew(self) -> None:
        """Renew the hold when idle; commits renew it by themselves."""
        if self.clock.monotonic() - self._renewed < self.ledger.hold / 3:
            return
        if await self.ledger.acquire(self.partition, self.incarnation, self._now()) != self.applied:
            raise Fenced(self.partition)
        self._renewed = self.clock.monotonic()

    async def _sweep(self) -> None:
        """Settle generations that wait for something other than events."""
        if self.clock.monotonic() - self._swept < SWEEP_SECONDS:
            return
        self._swept = self.clock.monotonic()
        for key in await self.sweep.run(self.applied, self._now(), self._lost):
            self._running.pop(key, None)
        metrics.RUNNING.set(await self.ledger.running())

    def _now(self) -> int:
        return round(self.clock.wall() * 1_000)


def _money(terms: Terms, batch: Batch, known: Mapping[Key, Generation]) -> Money:
    return Money(
        revision=terms.book.revision,
        entries=batch.entries,
        spending=steps(known, batch.whole),
        released=released(known, batch.whole),
    )
