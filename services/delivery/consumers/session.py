"""Read a durable consumer for one connection, for all protocols."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, NamedTuple

import msgspec
import structlog

from schemas.cursor import CursorIssuer
from schemas.subjects import parse_address
from services.delivery import metrics
from services.delivery.consumers.dead import DeadEvent, DeadEvents
from services.delivery.consumers.definition import AGAIN, Definition
from services.delivery.consumers.judging import Judge
from services.delivery.consumers.source import WAIT_SECONDS, Raw, Source
from services.delivery.consumers.tokens import Token
from services.delivery.errors import TooBusy
from services.kit.clock import Clock
from services.kit.jetstream.ack import ACK, nak
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.consumer import Durables
from services.kit.jetstream.pull import PATIENCE

__all__ = ["ConsumerSession", "Delivery", "Opened", "Origin"]

log = structlog.get_logger()
PULL_BYTES: Final = 256 * 1024
"""Most bytes of one pull; raised to the broker's largest message when that is larger."""
PULLS: Final = 4
"""Most partitions with a new pull at once. Together with `PULL_BYTES`, this bounds the memory of a session."""
OVERHEAD: Final = 4_096
"""Upper bound in bytes of a message's subject and headers."""
REFRESH_SECONDS: Final = 5.0
"""Longest age in seconds of the cached definition and partitions."""
SETTLE: Final = 0.1
"""Seconds to wait for available events before checking why none arrive."""
DEAD_PAUSE: Final = 30.0
"""Seconds until redelivery of an event that could not be stored as a dead event."""
BROKEN_PAUSE: Final = 0.5


class Delivery(NamedTuple):
    """One event for a service.

    ``token``: settles it. ``cursor``: the position after it in its session. ``deliveries``: number of its deliveries,
    including this one. ``data``: the event as stored. ``gap``: reason why events before it are missing.
    """

    token: str
    session: str
    cursor: str
    deliveries: int
    type: str
    data: bytes
    reply: str
    gap: str | None = None


class Origin(NamedTuple):
    """The stream of a broker's consumer, its incarnation, and the creation time of the consumer.

    ``cut``: last stream sequence before the log lost its end; ``None`` when nothing is lost, or when the consumer has
    passed the loss already.
    """

    stream: str
    incarnation: str
    created: str
    cut: int | None = None


class Opened(NamedTuple):
    """A consumer as sessions use it: its definition, and its streams by partition (and `AGAIN`)."""

    tenant: str
    name: str
    durable: str
    definition: Definition
    streams: dict[int, Origin]


class ConsumerSession:
    """Pull and settle events for one connection.

    Use it from one task: `pull`, then `ack` or `nack` the deliveries, and finally `close`. Events that are not settled
    are delivered again after the consumer's ``ack_wait``, to any of its sessions. Created by `Consumers.open`.
    """

    def __init__(
        self,
        broker: Broker,
        clock: Clock,
        judge: Judge,
        dead: DeadEvents,
        opened: Opened,
        reload: Callable[[], Awaitable[Opened | None]],
    ) -> None:
        self.opened = opened
        self.is_gone = False
        """Whether the consumer has been deleted: no more events follow."""
        self._broker = broker
        self._clock = clock
        self._judge = judge
        self._dead = dead
        self._reload = reload
        self._durables = Durables(broker)
        self._sources: dict[str, Source] = {}  # by stream; bounded by the number of partitions
        self._wake = asyncio.Event()
        self._turn = 0
        self._refreshed = clock.monotonic()
        self._is_open = False
        self._adopt(opened)

    async def open(self) -> None:
        """Subscribe to deliveries; call it once.

        Raises:
            BrokerUnavailable: the connection is closed.
        """
        for source in self._sources.values():
            await source.open()
        self._is_open = True
        metrics.CONSUMER_SESSIONS.inc()

    async def pull(self, limit: int, wait: float) -> list[Delivery]:
        """Return up to ``limit`` events: the available ones, else the first ones that arrive within ``wait`` seconds.

        Return an empty list when none arrived, the consumer is paused, or the broker is not connected.

        Raises:
            BrokerUnavailable: an event could not be judged because the log cannot be read, and no other was available.
        """
        given: list[Delivery] = []
        try:
            await self._pull(given, limit, self._clock.monotonic() + wait)
        except asyncio.CancelledError:
            await self.nack(given)
            raise
        except BrokerUnavailable:
            if not given:
                raise
        return given

    async def _pull(self, given: list[Delivery], limit: int, until: float) -> None:
        stop, full = until + PATIENCE, False
        while True:
            # Take the deliveries that have arrived.
            await self._refresh()
            before = len(given)
            await self._sift(given, limit)
            now = self._clock.monotonic()
            if given and not before:
                stop = now + PATIENCE
            if len(given) >= limit or self.is_gone or now >= stop:
                return
            # Pull more, unless nothing more can arrive soon.
            self._wake.clear()
            asked = await self._ask(limit - len(given), waiting=not given and now < until)
            if (full or not asked) and (given or now >= until):
                return
            # Wait for the next delivery; without one, check whether the consumer has reached ``max_in_flight``.
            left = until - now if not asked or full else SETTLE
            try:
                async with asyncio.timeout(min(left, self._patience(now))):
                    await self._wake.wait()
                full = False
            except TimeoutError:
                full = asked and await self._is_full()

    async def _is_full(self) -> bool:
        """Return whether ``max_ack_pending`` is reached: the broker then leaves pulls without an answer."""
        for source in self._sources.values():
            if source.answering():
                info = await self._durables.info(source.stream, source.durable)
                if info is not None and info.num_ack_pending < info.config.get("max_ack_pending", 0):
                    return False
        return True

    async def ack(self, deliveries: list[Delivery]) -> None:
        """Acknowledge events without waiting for the broker; a lost acknowledgement leads to a redelivery.

        Raises:
            BrokerUnavailable: the acknowledgement cannot be sent.
        """
        for delivery in deliveries:
            await self._broker.publish(delivery.reply, ACK)
        metrics.CONSUMER_SETTLED.labels("auto").inc(len(deliveries))

    async def nack(self, deliveries: list[Delivery], delay: float = 0.0) -> None:
        """Request redelivery of events after ``delay`` seconds.

        Raises:
            BrokerUnavailable: the request cannot be sent.
        """
        for delivery in deliveries:
            await self._nak(delivery.reply, delay)

    async def close(self) -> None:
        """Unsubscribe, and return buffered events to the broker for immediate redelivery. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        metrics.CONSUMER_SESSIONS.dec()
        sources = list(self._sources.values())
        await asyncio.gather(*(source.close() for source in sources))
        with suppress(BrokerUnavailable):
            for source in sources:
                while source.buffer:
                    _, reply, _ = source.buffer.popleft()
                    await self._nak(reply.decode(), 0.0)

    def reconnected(self) -> None:
        """Drop the open pulls after a reconnection: the broker has lost them."""
        for source in self._sources.values():
            source.forget()
        self._wake.set()

    def _adopt(self, opened: Opened) -> list[Source]:
        """Read from all current partitions; a re-created stream or consumer becomes a new source.

        Returns:
            The sources that are no longer read, for the caller to close.
        """
        self.opened = opened
        known = self._sources
        self._sources = {}
        for partition, origin in opened.streams.items():
            source = known.get(origin.stream)
            if source is None or source.incarnation != f"{origin.incarnation} {origin.created}":
                source = Source(self._broker, partition, origin.stream, opened.durable, self._wake.set)
                source.incarnation = f"{origin.incarnation} {origin.created}"
                source.cut = origin.cut
            self._sources[origin.stream] = source
        return [source for source in known.values() if self._sources.get(source.stream) is not source]

    async def _refresh(self) -> None:
        now = self._clock.monotonic()
        gone = any(source.is_gone for source in self._sources.values())
        if now - self._refreshed < (BROKEN_PAUSE if gone else REFRESH_SECONDS) or not self._broker.is_connected:
            return
        self._refreshed = now
        try:
            opened = await self._reload()
        except BrokerUnavailable as error:
            log.warning("consumer was not refreshed", consumer=self.opened.name, detail=str(error))
            return
        if opened is None:
            self.is_gone = True
            return
        for source in self._adopt(opened):
            await source.close()
        for source in self._sources.values():
            if source.is_gone:
                source.forget()

    def _patience(self, now: float) -> float:
        """Return the seconds until the next check when no event arrives."""
        return max(0.05, min(1.0, self._refreshed + REFRESH_SECONDS - now))

    async def _ask(self, wanted: int, *, waiting: bool) -> bool:
        """Pull from partitions without an open pull; return whether available events may arrive soon.

        Partitions that may have events get a pull for a share of ``wanted``; with ``waiting``, empty partitions get a
        pull for the next event.
        """
        if not self._broker.is_connected:
            return False
        order = list(self._sources.values())
        self._turn = (self._turn + 1) % len(order)
        order = order[self._turn :] + order[: self._turn]
        idle = [s for s in order if s.may_be_asked()]
        wanted -= sum(s.answering() for s in order)
        filled = [s for s in idle if not s.is_empty][: max(0, min(wanted, PULLS))]
        max_bytes = max(PULL_BYTES, self._broker.client.max_payload + OVERHEAD)
        for source in filled:
            await source.ask(max(1, wanted // len(filled)), max_bytes)
        if waiting:
            for source in idle:
                if source.is_empty:
                    await source.ask(1, max_bytes, WAIT_SECONDS)
        return bool(filled) or any(s.answering() for s in order)

    async def _sift(self, given: list[Delivery], limit: int) -> None:
        """Move accepted events from the buffers to ``given``; settle the others."""
        for source in list(self._sources.values()):
            while source.buffer and len(given) < limit:
                delivery = await self._event_of(source, source.next())
                source.buffer.popleft()
                if delivery is not None:
                    given.append(delivery)
                    metrics.CONSUMER_GIVEN.labels("yes" if delivery.deliveries > 1 else "no").inc()

    async def _event_of(self, source: Source, raw: Raw) -> Delivery | None:
        """Return the event of a delivery, or None when it was settled here."""
        found = self._dead_event(source, raw) if source.partition == AGAIN else await self._accepted(source, raw)
        if found is None:
            await self._broker.publish(raw.reply, ACK)
            return None
        if raw.deliveries <= self.opened.definition.spec.max_deliver:
            return found
        await self._put_dead(found, raw)
        return None

    async def _accepted(self, source: Source, raw: Raw) -> Delivery | None:
        incarnation = self.opened.streams[source.partition].incarnation
        judgement = await self._judge.judge(
            source.stream, incarnation, raw.subject, raw.seq, raw.data, since=source.seen(raw)
        )
        header, types = judgement.header, self.opened.definition.spec.types
        if not judgement.accepted or header is None or (types is not None and header.type not in types):
            return None
        session = parse_address(raw.subject).session
        issuer = CursorIssuer(source.partition, incarnation, self.opened.tenant, session)
        gap = source.gap_before(raw.seq) or judgement.gap or None
        return Delivery(
            token=Token(source.partition, issuer.incarnation, raw.seq, raw.consumer_seq, raw.deliveries).text(),
            session=session,
            cursor=issuer.issue(raw.seq),
            deliveries=raw.deliveries,
            type=header.type,
            data=raw.data,
            reply=raw.reply,
            gap=gap,
        )

    def _dead_event(self, source: Source, raw: Raw) -> Delivery | None:
        """Return a dead event to redeliver; it was judged before it became dead."""
        incarnation = CursorIssuer(0, self.opened.streams[AGAIN].incarnation, "", "").incarnation
        try:
            dead = msgspec.json.decode(raw.data, type=DeadEvent)
        except msgspec.DecodeError:
            return None
        return Delivery(
            token=Token(AGAIN, incarnation, raw.seq, raw.consumer_seq, raw.deliveries).text(),
            session=dead.session,
            cursor=dead.id,
            deliveries=raw.deliveries,
            type=dead.type,
            data=bytes(dead.event),
            reply=raw.reply,
        )

    async def _put_dead(self, delivery: Delivery, raw: Raw) -> None:
        """Store an event that has reached ``max_deliver`` as a dead event, then acknowledge it."""
        header = msgspec.json.decode(delivery.data, type=_Named)
        dead = DeadEvent(
            id=delivery.cursor,
            session=delivery.session,
            generation=header.generation,
            seq=header.seq,
            type=delivery.type,
            deliveries=raw.deliveries - 1,
            died_at=self._clock.wall(),
            event=msgspec.Raw(delivery.data),
        )
        try:
            await self._dead.put(self.opened.tenant, self.opened.name, dead)
        except TooBusy as error:
            metrics.CONSUMER_BLOCKED.inc()
            log.warning("dead event was not stored", consumer=self.opened.name, detail=str(error))
            await self._nak(raw.reply, DEAD_PAUSE)
            return
        log.info("dead event stored", consumer=self.opened.name, cursor=delivery.cursor, deliveries=dead.deliveries)
        await self._broker.publish(raw.reply, ACK)

    async def _nak(self, reply: str, delay: float) -> None:
        await self._broker.publish(reply, nak(delay))


class _Named(msgspec.Struct):
    generation: str
    seq: int
