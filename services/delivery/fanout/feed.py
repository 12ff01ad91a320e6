"""Follow one live session per feed: read the log, join it to the live subject, write to all subscribers."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog

from schemas.codec import MalformedEvent, decode_header
from schemas.cursor import CursorIssuer
from schemas.events import TERMINAL_TYPES
from schemas.subjects import live_filter
from services.delivery import metrics
from services.delivery.fanout.replay import replay
from services.delivery.fanout.subscriber import Subscriber
from services.delivery.fanout.view import Views
from services.delivery.formats.format import Address
from services.delivery.formats.granularity import Position
from services.delivery.formats.tail import Entry, Positions, Tail, replay_start
from services.delivery.log.reader import LogReader
from services.delivery.log.states import LogStates
from services.delivery.reports.counting import DeliveryCounts
from services.delivery.settings import Settings
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable, ReadFailed, Stored
from services.kit.jetstream.client import header_number
from services.kit.jetstream.connection import Subscription

__all__ = ["LAST_WRITE_SECONDS", "Feed"]

log = structlog.get_logger()
OPEN_TRIES: Final = 16
_SEQUENCE: Final = b"Nats-Sequence: "
_BEFORE: Final = b"Nats-Last-Sequence: "
BEHIND_MESSAGES: Final = 20_000
QUIET_RUNNING: Final = 3.0
QUIET_IDLE: Final = 60.0
LAST_WRITE_SECONDS: Final = 5.0
"""Seconds that a client may take to receive the message that ends its stream."""
_GAPS: Final = {"gap": "log_recreated", "deleted": "deleted"}
"""Gap reason to send last, by the reason why the stream ends."""
_SILENT_ENDS: Final = frozenset({"complete", "disconnected", "evicted", "batch", "sibling"})


class Feed:
    """Follow one session and serve its subscribers. `open` must return before the first subscriber is served.

    ``settings.feed_bytes`` bounds the events kept in memory. ``counts``: counts delivered events for billing.
    """

    def __init__(
        self,
        broker: Broker,
        clock: Clock,
        states: LogStates,
        issuer: CursorIssuer,
        tenant: str,
        session: str,
        settings: Settings,
        counts: DeliveryCounts | None,
    ) -> None:
        self.tenant = tenant
        self.session = session
        self.issuer = issuer
        self.address = Address(session, issuer.prefix.encode())
        self.tail = Tail(0, settings.feed_bytes)
        self.subscribers: set[Subscriber] = set()
        self.readers: set[Subscriber] = set()  # served from the log until memory reaches back far enough
        self.closed = False
        self.deleted_through = 0  # the session was deleted up to this stream sequence, as of opening
        self.idle_since: float | None = None
        self._broker = broker
        self._clock = clock
        self._states = states
        self._counts = counts
        self._stall = settings.stall
        self._heartbeat = settings.heartbeat
        self._max_bytes = settings.feed_bytes
        self._reader = LogReader(broker, issuer.partition, tenant, session)
        self._views = Views(self.tail, self.address, clock, self._max_bytes)
        self._subscription: Subscription | None = None
        self._last_seq = 0
        self._on_subject: dict[str, int] = {}  # last stream sequence seen of each generation …
        self._since = 0  # … that has any above this one
        # Live messages that wait for a read-back, each with the sequence before it on its subject; None when in step.
        self._behind: deque[tuple[Stored, int]] | None = deque()
        self._overflowed = False
        self._reading = asyncio.Lock()
        self._healing: asyncio.Task[None] | None = None
        self._flush_due = False
        self._newest_at = 0.0
        self._heard = 0
        self._quiet_since = clock.monotonic()
        self._loop = asyncio.get_running_loop()
        self._connection = self._reconnects()

    async def open(self, after: int | None = None) -> None:
        """Subscribe to the live subject, read the running or latest answer from the log, and join both.

        ``after``: stream sequence up to which the log is known to hold no event of the session.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        subject = live_filter(self.issuer.partition, self.tenant, self.session)
        self._subscription = await self._broker.listen(subject, self._live)
        # The broker processes a connection's input in order: it knows the subscription when it answers the first read.
        async with self._reading:
            if after is None:
                await self._read_latest()
            else:
                self._reset(after)
                await self._read_from(after + 1)
            await self._join()

    async def close(self) -> None:
        """Stop following; the subscribers must have been stopped before. Idempotent."""
        self.closed = True
        self._views.close()
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await self._broker.unlisten(subscription)
        if self._healing is not None:
            self._healing.cancel()

    def everyone(self) -> list[Subscriber]:
        """Return all subscribers, served from memory or from the log."""
        return [*self.subscribers, *self.readers]

    async def serve(self, subscriber: Subscriber, caught_up: Callable[[Subscriber], None] | None = None) -> str:
        """Serve a subscriber to the end of its stream; return why it ended.

        Alternates between two sources: the log until memory reaches back far enough, then memory until the subscriber
        falls behind it. ``caught_up`` is called each time the subscriber switches to memory; events beyond the client's
        credit may still be pending then.
        """
        protocol, reason = subscriber.format.protocol, "failed"
        metrics.SUBSCRIBERS.labels(protocol).inc()
        subscriber.heartbeat = self._heartbeat
        self._hold(subscriber)
        try:
            reason = await self._serve(subscriber, caught_up)
        finally:
            subscriber.stop(reason)
            self.count([subscriber])
            self._remove(subscriber)
            metrics.SUBSCRIBERS.labels(protocol).dec()
            metrics.CLOSED.labels(reason).inc()
            await subscriber.close()
        return reason

    def count(self, subscribers: Iterable[Subscriber]) -> None:
        """Count for billing the events sent to subscribers from memory since the last call."""
        if self._counts is not None:
            self._counts.count(self.tenant, self.session, self.tail, subscribers)

    async def _serve(self, subscriber: Subscriber, caught_up: Callable[[Subscriber], None] | None) -> str:
        format_ = subscriber.format
        opening = format_.opening(self.address)
        try:
            if opening:
                await subscriber.send(format_.message([opening], ends=False))
            reason = await self._follow(subscriber, caught_up)
        except BrokerUnavailable as error:
            log.warning("stream ended: the log cannot be read", session=self.session, detail=str(error))
            reason = "unavailable"
        await self._say_goodbye(subscriber, reason)
        return reason

    async def _follow(self, subscriber: Subscriber, caught_up: Callable[[Subscriber], None] | None) -> str:
        """Serve a subscriber until its stream ends; return the reason."""
        while True:
            if self.closed:
                subscriber.stop("lifetime")
            # From the log, until memory reaches back far enough.
            if subscriber.seq < self._floor(subscriber):
                if await self._catch_up(subscriber):
                    return "complete"
                if subscriber.seq < self._floor(subscriber) and not subscriber.done.done():
                    continue
            # From memory: flushes write to it from now on, until its stream ends or it falls behind.
            if not subscriber.done.done():
                self._add(subscriber)
                if caught_up is not None:
                    caught_up(subscriber)
            reason = await subscriber.done
            if reason != "behind":
                return reason
            # Memory has dropped its next event: read from the log again once its last write has completed.
            self._hold(subscriber)
            if not await subscriber.through(self._stall):
                return "evicted"
            subscriber.rearm()

    async def _catch_up(self, subscriber: Subscriber) -> bool:
        """Serve a subscriber from the log until memory reaches back far enough.

        Returns whether the requested generation has ended within the events sent.
        """
        metrics.REPLAYS.inc()
        reader = self._states.reader(self.tenant, self.session, self.issuer.partition)

        def counted(entries: Sequence[Entry]) -> None:
            if self._counts is not None:
                self._counts.count_replayed(self.tenant, self.session, subscriber, entries)

        while subscriber.seq < self._floor(subscriber) and not subscriber.done.done():
            floor = self._floor(subscriber)
            self.count([subscriber])
            ended = await replay(reader, subscriber, self.address, floor, counted)
            subscriber.accounted = subscriber.seq
            if ended:
                return True
            if not subscriber.done.done() and subscriber.seq < floor:
                subscriber.position = Position(floor)
                subscriber.accounted = floor
        return False

    async def _say_goodbye(self, subscriber: Subscriber, reason: str) -> None:
        """Send the last message: the reason of the end and the cursor to resume from."""
        if reason in _SILENT_ENDS:
            return
        if reason == "terminal":
            await subscriber.through(self._stall)
            return
        if not await subscriber.through(LAST_WRITE_SECONDS):
            return
        format_, at = subscriber.format, self.address.inside(subscriber.offset)
        gap = _GAPS.get(reason)
        last = format_.gap(gap, None, at) if gap else format_.bye(reason, subscriber.seq, at)
        await subscriber.send(format_.message([last], ends=True))
        await subscriber.through(LAST_WRITE_SECONDS)

    def _hold(self, subscriber: Subscriber) -> None:
        """Keep the feed open for a subscriber that currently reads from the log."""
        self.subscribers.discard(subscriber)
        self._views.hold(subscriber)
        self.readers.add(subscriber)
        self.idle_since = None

    def _add(self, subscriber: Subscriber) -> None:
        """Serve a subscriber from memory; it must be at or above its floor."""
        self.readers.discard(subscriber)
        self.subscribers.add(subscriber)
        self.idle_since = None
        self._views.add(subscriber)

    def _remove(self, subscriber: Subscriber) -> None:
        """Forget a subscriber."""
        self.subscribers.discard(subscriber)
        self.readers.discard(subscriber)
        self._views.remove(subscriber)
        if not self.subscribers and not self.readers:
            self.idle_since = self._clock.monotonic()

    def _floor(self, subscriber: Subscriber) -> int:
        """Return the lowest stream sequence from which a subscriber can be served from memory."""
        return self._views.floor(subscriber)

    @property
    def size(self) -> int:
        """Bytes of the events kept in memory, over all granularities in use."""
        return self._views.size

    def latest_start(self) -> int:
        """Return the stream sequence *before* the running or latest answer."""
        start = replay_start(self.tail.spans)
        return self._last_seq if start is None else start - 1

    @property
    def last_seq(self) -> int:
        """The stream sequence up to which the log has been seen."""
        return self._last_seq

    async def reread(self, start: int | None = None, *, until: int | None = None) -> None:
        """Read the events stored since the last message that arrived, or from ``start`` on.

        ``until``: skip the read when the log has already been seen up to this stream sequence.
        """
        async with self._reading:
            if until is not None and self._last_seq >= until:
                return
            if self._behind is None:
                self._behind = deque()
            self._connection = self._reconnects()
            await self._look_for_loss()
            await self._read_from(self._last_seq + 1 if start is None else start)
            await self._join()
        self._flush()

    async def reach(self, seq: int) -> None:
        """Read from the log if it has not been seen up to the stream sequence ``seq``.

        A client from another replica may be ahead of this one; it would then get events twice.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        if seq > self._last_seq:
            await self.reread(until=seq)  # of concurrent callers only one reads

    def is_quiet(self, now: float) -> bool:
        """Return whether no message has arrived for so long that `check` is due; called about every second."""
        if self._last_seq != self._heard:
            self._heard, self._quiet_since = self._last_seq, now
            return False
        running = any(not span.ended for span in self.tail.spans.values())
        if now - self._quiet_since < (QUIET_RUNNING if running else QUIET_IDLE):
            return False
        self._quiet_since = now
        return True

    async def check(self) -> None:
        """Read from the log if it holds more than the live messages received.

        A live message lost between two brokers is detected only by the next one; after the last one there is none.
        """
        last = await self._broker.last(self._reader.stream, self._reader.filter)
        if last is not None and last.seq > self._last_seq and self.in_step:
            log.warning("live messages were lost", session=self.session, heard=self._last_seq, stored=last.seq)
            await self.reread()
            metrics.GAPS.labels("yes").inc()

    def _reconnects(self) -> int:
        return self._broker.reconnects

    async def _read_latest(self) -> None:
        stream, reader = self._reader.stream, self._reader
        last = await self._broker.last(stream, reader.filter)
        if last is None:
            return
        # Begin at the latest generation, or at the earliest one that still runs.
        start = await reader.first_of(last.subject.rsplit(".", 1)[-1]) or last.seq
        start = min([start, *await self._running()])
        for _ in range(OPEN_TRIES):
            self._reset(start - 1)
            await self._read_from(start)
            # Generations that overlap this range may begin earlier: read again from there.
            earlier = [first for first in await self._firsts() if first < start]
            if not earlier:
                return
            start = min(earlier)

    async def _running(self) -> list[int]:
        """Return the first stream sequences of generations that have not ended, however long they are idle."""
        reader, found = self._reader, []
        try:
            newest = await self._broker.lasts(reader.stream, reader.filter)
        except ReadFailed as error:
            log.warning("running generations not looked up", session=self.session, detail=str(error))
            return []
        for stored in newest:
            generation = stored.subject.rsplit(".", 1)[-1]
            try:
                ended = decode_header(stored.data).type in TERMINAL_TYPES
            except MalformedEvent:
                ended = False
            if not ended and not (await reader.before(generation, stored.seq + 1)).ended:
                first = await reader.first_of(generation)
                found += [] if first is None else [first]
        return found

    async def _firsts(self) -> list[int]:
        firsts = [await self._reader.first_of(generation) for generation in list(self.tail.spans)[:OPEN_TRIES]]
        return [first for first in firsts if first is not None]

    def _reset(self, floor: int) -> None:
        self.tail = Tail(floor, self._max_bytes)
        self._views = Views(self.tail, self.address, self._clock, self._max_bytes)
        self._reader.positions = Positions()
        self._on_subject.clear()
        self._last_seq = self._since = floor

    async def _read_from(self, start: int) -> None:
        """Take what the log keeps of the session from the stream sequence ``start`` on.

        Live messages of a generation that is met here may have been lost before ``start``; they are taken first.
        Without them the rule would drop what follows, and nothing would show the hole again.
        """
        met: set[str] = set()  # bounded by what is read
        async for batch in self._broker.read(self._reader.stream, self._reader.filter, start):
            for stored in batch:
                generation = stored.subject.rsplit(".", 1)[-1]
                if generation not in met:
                    met.add(generation)
                    await self._take_earlier(stored.subject, self._on_subject.get(generation, self._since), start)
                await self._take(stored)

    async def _take_earlier(self, subject: str, known: int, start: int) -> None:
        """Take a generation's messages between the stream sequences ``known`` and ``start``, both excluded."""
        if start > known + 1:
            async for batch in self._broker.read(self._reader.stream, subject, known + 1, up_to=start - 1):
                for stored in batch:
                    await self._take(stored)

    async def _look_for_loss(self) -> None:
        """Join generations again if events expired before they were read here: a takeover may have been among them."""
        first = await self._broker.first(self._reader.stream, self._reader.filter)
        if first is not None and first.seq > self._last_seq:
            await self._reader.join_again()

    async def _join(self) -> None:
        """Process the live messages buffered during the read-back; later ones are processed on arrival."""
        while self._behind or self._overflowed:
            # The buffer overflowed: read everything after the last seen message from the log.
            if self._overflowed:
                self._overflowed = False
                await self._read_from(self._last_seq + 1)
                continue
            stored, before = self._behind.popleft()  # type: ignore[union-attr]  # only `reread` and this replace it
            generation = stored.subject.rsplit(".", 1)[-1]
            known = self._on_subject.get(generation)
            # Messages before this one are missing: read them first.
            if before > (self._since if known is None else known):
                await self._read_from(1 + await self._before_missing(generation, known))
            if stored.seq > self._last_seq:
                await self._take(stored)
        self._behind = None

    async def _take(self, stored: Stored) -> None:
        entry = await self._reader.accept(stored)
        self._note(stored)
        if entry is not None:
            # What was missed and read late comes behind what was delivered meanwhile: cursors never go back.
            moved = entry.seq < self._last_seq
            self.tail.append(entry._replace(seq=self._last_seq, moved=True) if moved else entry)

    def _note(self, stored: Stored) -> None:
        self._last_seq = max(stored.seq, self._last_seq)
        self._on_subject[stored.subject.rsplit(".", 1)[-1]] = stored.seq
        if len(self._on_subject) > 2_000:
            for generation in list(self._on_subject)[:1_000]:
                self._since = max(self._since, self._on_subject.pop(generation))

    def _live(self, subject: str, data: bytes, headers: bytes) -> None:
        seq, before = header_number(headers, _SEQUENCE), header_number(headers, _BEFORE)
        if seq is None or before is None:
            metrics.EVENTS_IN.labels("foreign").inc()
            return
        stored = Stored(seq, subject, data)
        if self._behind is None and self._connection != self._reconnects():
            self._behind = deque()  # messages missed while disconnected come before this one
        if self._behind is not None:
            self._wait(stored, before)
            return
        if stored.seq <= self._last_seq:
            return
        # Compare the previous sequence on this subject with the last one seen of the generation.
        generation = subject.rsplit(".", 1)[-1]
        known = self._on_subject.get(generation)
        # Without `before` it is the oldest message kept of its generation; `_take_live` checks whether it is the first.
        if known is None and before == 0:
            self._take_live(stored)
            return
        if known is None and before > self._since:
            self._heal(stored, before, None)
            return
        if known is None or (known == before and not self._reader.positions.knows(generation)):
            self._heal(stored, before, self._last_seq)
            return
        if known != before:
            self._heal(stored, before, known)
            return
        self._take_live(stored)

    def _wait(self, stored: Stored, before: int) -> None:
        """Buffer a live message until the read-back completes; on overflow drop the buffer and rely on the log."""
        assert self._behind is not None
        if len(self._behind) >= BEHIND_MESSAGES:
            self._behind.clear()
            self._overflowed = True
        if not self._overflowed:
            self._behind.append((stored, before))

    def _take_live(self, stored: Stored) -> None:
        try:
            header = decode_header(stored.data)
        except MalformedEvent:
            metrics.EVENTS_IN.labels("malformed").inc()
            self._note(stored)
            return
        entry = self._reader.judge(header, stored)
        if entry is None and self._reader.begins_late(header):
            self._heal(stored, 0, self._last_seq)
            return
        self._note(stored)
        if entry is not None:
            self.tail.append(entry)
            self._newest_at = header.at
            if not header.seq:
                metrics.HEARD.observe(max(0.0, self._clock.wall() - header.at))
            if not self._flush_due:
                self._flush_due = True
                self._loop.call_soon(self._flush)

    def _heal(self, stored: Stored, before: int, known: int | None) -> None:
        """Start a read-back of messages missing after the stream sequence ``known``, or of a new generation.

        Without ``known`` the beginning of the generation itself is missing.
        """
        self._behind = deque([(stored, before)])
        generation = stored.subject.rsplit(".", 1)[-1]
        self._healing = self._loop.create_task(self._read_missing(generation, known))

    async def _before_missing(self, generation: str, known: int | None) -> int:
        """Return the stream sequence after which messages of a generation are missing."""
        if known is not None:
            return known
        first = await self._reader.first_of(generation)
        return max(self._since, (first or self._last_seq + 1) - 1)

    async def _read_missing(self, generation: str, known: int | None) -> None:
        try:
            await self.reread(1 + await self._before_missing(generation, known))
            metrics.GAPS.labels("yes").inc()
        except BrokerUnavailable as error:
            metrics.GAPS.labels("no").inc()
            log.warning("gap not read again yet", session=self.session, detail=str(error))

    @property
    def in_step(self) -> bool:
        """Whether live messages are processed on arrival (no read-back is due)."""
        return self._behind is None

    def _flush(self) -> None:
        """Write new events to every subscriber that is ready."""
        self._flush_due = False
        writes = self._views.flush()
        if writes:
            metrics.WRITES.inc(writes)
            if self._newest_at:
                metrics.ADDED_LATENCY.observe(max(0.0, self._clock.wall() - self._newest_at))
