"""Streams of events, whatever the protocol: found, joined to their feed, served to their end."""

from collections.abc import Callable
from typing import Final, NamedTuple

import structlog

from schemas.names import InvalidName, check_name
from schemas.requests import GenerationRecord
from services.delivery import metrics
from services.delivery.errors import CursorExpired, CursorForeign, Deleted, DeliveryError, TooBusy, Unknown
from services.delivery.fanout.feed import Feed
from services.delivery.fanout.hub import Hub
from services.delivery.fanout.start_position import Start, check_cursor, wanted_start
from services.delivery.fanout.subscriber import Send, Subscriber
from services.delivery.formats.format import Format
from services.delivery.formats.granularity import TOKEN, Grain, Place, wanted_grain
from services.delivery.requests.generations import ENDED, Lookups
from services.kit.auth.principal import Principal, authorize
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem

__all__ = ["Stream", "Streams", "Wish", "problem_of"]

log = structlog.get_logger()
LAST_WRITE_SECONDS: Final = 5.0
_GAPS: Final = {"gap": "log_recreated", "deleted": "deleted"}
"""Reasons of gaps behind which a stream ends, by why it ends."""
_SILENT_ENDS: Final = frozenset({"complete", "disconnected", "evicted", "batch", "sibling"})


class Wish(NamedTuple):
    """What a subscriber asks for: a session or one generation of it, after a cursor or from a start, and how fine."""

    session: str
    generation: str | None = None
    cursor: str | None = None
    start: Start = Start()
    grain: Grain = TOKEN

    @classmethod
    def read(
        cls,
        session: str,
        *,
        generation: str | None = None,
        after: str | None = None,
        last_event_id: str | None = None,
        from_: str | None = None,
        granularity: str | None = None,
        coalesce: int | None = None,
    ) -> "Wish":
        """Return the wish that a client's words mean.

        Raises:
            Problem: 400, a name or start is not valid.
        """
        try:
            check_name("session", session)
            if generation is not None:
                check_name("generation", generation)
            cursor, start = wanted_start(after, last_event_id, from_)
            grain = wanted_grain(granularity, coalesce)
        except (InvalidName, ValueError) as error:
            raise Problem(400, str(error)) from error
        return cls(session, generation, cursor, start, grain)


class Stream(NamedTuple):
    """A wish that can be met: the feed, and the stream sequence after which to read (``None``: nothing follows).

    ``offset``: how many characters of the event behind it are known already.
    """

    feed: Feed
    wish: Wish
    principal: Principal
    seq: int | None
    offset: int = 0

    @property
    def cursor(self) -> str:
        """The position from which it is read; empty when nothing follows."""
        return "" if self.seq is None else self.feed.address.inside(self.offset).cursor(self.seq).decode()


class Streams:
    """Opens streams and serves them; every protocol goes through here."""

    def __init__(self, hub: Hub, lookups: Lookups) -> None:
        self._hub = hub
        self._lookups = lookups

    async def open(self, principal: Principal, wish: Wish) -> Stream:
        """Return a stream that can be served.

        Raises:
            Problem: the wish cannot be met: 400, 403, 404, 410 or 503.
        """
        authorize(principal, "read", wish.session)
        self._hub.connections.check(principal)
        if self._hub.draining:
            raise Problem(503, "this replica is going away", headers={"Retry-After": "1"})
        try:
            feed, place = await self._locate(principal.tenant, wish)
        except DeliveryError as error:
            raise problem_of(error) from error
        except BrokerUnavailable as error:
            raise Problem(503, "the log cannot be reached", headers={"Retry-After": "1"}) from error
        return Stream(feed, wish, principal, *(place or (None, 0)))

    async def serve(
        self,
        stream: Stream,
        send: Send,
        format_: Format,
        joined: Callable[[Subscriber], None] | None = None,
        caught_up: Callable[[Subscriber], None] | None = None,
    ) -> str:
        """Serve a stream to its end; return why it ended.

        ``send`` takes the messages of ``format_``. ``joined`` is called with the subscriber before anything is sent: to
        end it when the client leaves, and to limit what it may be sent. ``caught_up`` is called whenever what is stored
        has been sent as far as the client lets it: from then on it comes as it is said.

        Raises:
            ValueError: nothing follows: `open` said so.
        """
        feed, wish = stream.feed, stream.wish
        if stream.seq is None:
            raise ValueError("a stream that has been read to its end cannot be served")
        subscriber = Subscriber(send, format_, wish.generation, stream.seq, stream.offset, wish.grain)
        self._hub.set_end(subscriber, stream.principal.expires_at)
        with self._hub.stream(stream.principal, subscriber.finish):
            async with self._hub.presence.listening(feed.tenant, feed.session, wish.generation):
                metrics.SUBSCRIBERS.labels(format_.protocol).inc()
                feed.hold(subscriber)
                reason = "failed"
                try:
                    if joined is not None:
                        joined(subscriber)
                    reason = await self._serve(feed, subscriber, caught_up)
                finally:
                    self._hub.settle(feed, [subscriber])
                    feed.remove(subscriber)
                    metrics.SUBSCRIBERS.labels(format_.protocol).dec()
                    metrics.CLOSED.labels(reason).inc()
                    await subscriber.close()
        return reason

    async def _serve(self, feed: Feed, subscriber: Subscriber, caught_up: Callable[[Subscriber], None] | None) -> str:
        format_ = subscriber.format
        opening = format_.opening(feed.address)
        try:
            if opening:
                await subscriber.send(format_.message([opening], ends=False))
            reason = await self._follow(feed, subscriber, caught_up)
        except BrokerUnavailable as error:
            log.warning("stream ended: the log cannot be read", session=feed.session, detail=str(error))
            reason = "unavailable"
        await self._say_goodbye(feed, subscriber, reason)
        return reason

    async def _follow(self, feed: Feed, subscriber: Subscriber, caught_up: Callable[[Subscriber], None] | None) -> str:
        """Serve from the log and from memory in turn until the stream is to end; return why."""
        while True:
            if self._hub.draining:
                subscriber.finish("drain")
            if feed.closed:
                subscriber.finish("lifetime")
            if subscriber.seq < feed.floor(subscriber):
                if await self._hub.catch_up(feed, subscriber):
                    return "complete"
                if subscriber.seq < feed.floor(subscriber) and not subscriber.done.done():
                    continue
            if not subscriber.done.done():
                feed.add(subscriber)
                if caught_up is not None:
                    caught_up(subscriber)
            reason = await subscriber.done
            if reason != "behind":
                return reason
            feed.hold(subscriber)
            if not await subscriber.through(self._hub.limits.stall):
                return "evicted"
            subscriber.rearm()

    async def _say_goodbye(self, feed: Feed, subscriber: Subscriber, reason: str) -> None:
        if reason in _SILENT_ENDS:
            return
        if reason == "terminal":
            await subscriber.through(self._hub.limits.stall)
            return
        if not await subscriber.through(LAST_WRITE_SECONDS):
            return
        format_, at = subscriber.format, feed.address.inside(subscriber.offset)
        gap = _GAPS.get(reason)
        last = format_.gap(gap, None, at) if gap else format_.bye(reason, subscriber.seq, at)
        await subscriber.send(format_.message([last], ends=True))
        await subscriber.through(LAST_WRITE_SECONDS)

    async def _locate(self, tenant: str, wish: Wish) -> tuple[Feed, Place | None]:
        """Return the feed and the place after which to read; ``None`` when all has been read already."""
        record = None
        if wish.generation is not None:
            record = await self._lookups.require(tenant, wish.session, wish.generation)
        feed = await self._hub.feed(tenant, wish.session)
        if wish.cursor is not None:
            place = await self._check(wish.cursor, feed)
            if wish.generation is None and place.seq <= feed.deleted_through:
                await self._require_anew(feed, place.seq)
            await feed.reach(place.seq + (place.offset > 0))
        else:
            if wish.generation is None and feed.deleted_through:
                await self._require_anew(feed, feed.deleted_through)
            place = Place(await self._beginning(feed, wish.generation, wish.start))
            if wish.start.where != "live":
                if await self._has_expired(feed, record, place.seq):
                    raise CursorExpired(
                        f"generation {wish.generation!r} has ended, and no event of it is kept any more"
                    )
                return feed, place
        if await self._has_expired(feed, record, place.seq):
            return feed, None
        if wish.generation is not None and await self._ended(feed, wish.generation, place.seq):
            return feed, None
        return feed, place

    async def _check(self, text: str, feed: Feed) -> Place:
        state = await self._hub.state(feed.issuer.partition)
        try:
            cursor = check_cursor(text, feed.issuer, state.first_seq, max(state.last_seq, feed.last_seq))
        except CursorExpired:
            state = await self._hub.state(feed.issuer.partition, fresh=True)
            cursor = check_cursor(text, feed.issuer, state.first_seq, max(state.last_seq, feed.last_seq))
        return Place(cursor.seq, cursor.offset)

    async def _has_expired(self, feed: Feed, record: GenerationRecord | None, seq: int) -> bool:
        """Tell whether a generation has ended and nothing of it is kept: a reader would wait for ever."""
        if record is None or record.state not in ENDED or seq < feed.last_seq:
            return False
        reader = self._hub.reader(feed.tenant, feed.session, feed.issuer.partition)
        return await reader.first_of(record.generation) is None

    async def _require_anew(self, feed: Feed, seq: int) -> None:
        """Find out whether a reader behind the stream sequence ``seq`` reads what was started since the deletion.

        Raises:
            Deleted: it would read what was deleted, or nothing was started since.
        """
        behind = seq >= feed.deleted_through
        if not behind or (feed.tail.end == 0 and not await self._lookups.of_session(feed.tenant, feed.session)):
            raise Deleted(f"session {feed.session!r} was deleted")

    async def _ended(self, feed: Feed, generation: str, seq: int) -> bool:
        reader = self._hub.reader(feed.tenant, feed.session, feed.issuer.partition)
        return (await reader.before(generation, seq + 1)).ended

    async def _beginning(self, feed: Feed, generation: str | None, start: Start) -> int:
        if start.where == "live":
            return feed.last_seq
        if generation is not None:
            span = feed.tail.spans.get(generation)
            if span is not None and span.first > feed.tail.floor:
                return span.first - 1
            seen = feed.last_seq  # before asking: what is stored meanwhile must not be skipped
            first = await self._hub.reader(feed.tenant, feed.session, feed.issuer.partition).first_of(generation)
            return seen if first is None else first - 1
        return 0 if start.where == "start" else feed.latest_start()


def problem_of(error: DeliveryError) -> Problem:
    """Return the answer that an error of this service means over HTTP; other protocols map its status."""
    match error:
        case CursorForeign():
            return Problem(400, str(error), slug="cursor-invalid", title="The cursor is not valid here")
        case CursorExpired():
            return Problem(410, str(error), slug="cursor-expired", title="The cursor has expired")
        case Deleted():
            return Problem(410, str(error), slug="session-deleted", title="The session was deleted")
        case Unknown():
            return Problem(404, str(error))
        case TooBusy():
            return Problem(503, str(error), headers={"Retry-After": "2"})
        case _:
            return Problem(500, "the error has been logged")
