"""Open and serve event streams for every protocol."""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from schemas.names import InvalidName, check_name
from schemas.requests import GenerationRecord
from services.delivery.errors import (
    CursorExpired,
    Deleted,
    DeliveryError,
    problem_of,
    unreachable,
)
from services.delivery.fanout.feed import Feed
from services.delivery.fanout.feeds import Feeds
from services.delivery.fanout.presence import Presence
from services.delivery.fanout.start_position import StartPosition, check_cursor, parse_start
from services.delivery.fanout.subscriber import Send, Subscriber
from services.delivery.fanout.supervisor import Supervisor
from services.delivery.formats.format import Format
from services.delivery.formats.granularity import TOKEN, Granularity, Position, parse_granularity
from services.delivery.log.states import LogStates
from services.delivery.requests.generations import ENDED, Lookups
from services.delivery.requests.recent_starts import RecentStart, RecentStarts
from services.kit.auth.principal import Principal, authorize
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem

__all__ = ["Stream", "Streams", "ReadOptions"]


class ReadOptions(NamedTuple):
    """Select what a subscriber reads: a session or one generation, a cursor or start position, and the granularity."""

    session: str
    generation: str | None = None
    cursor: str | None = None
    start: StartPosition = StartPosition()
    granularity: Granularity = TOKEN

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
    ) -> "ReadOptions":
        """Parse a client's parameters.

        Raises:
            Problem: 400, a name or start is not valid.
        """
        try:
            check_name("session", session)
            if generation is not None:
                check_name("generation", generation)
            cursor, start = parse_start(after, last_event_id, from_)
            parsed = parse_granularity(granularity, coalesce)
        except (InvalidName, ValueError) as error:
            raise Problem(400, str(error)) from error
        return cls(session, generation, cursor, start, parsed)


class Stream(NamedTuple):
    """Hold an opened stream: the feed, and the stream sequence after which to read (``None``: nothing follows).

    ``offset``: characters of the next event that the client has already.
    """

    feed: Feed
    options: ReadOptions
    principal: Principal
    seq: int | None
    offset: int = 0

    @property
    def cursor(self) -> str:
        """The cursor after which it is read; empty when nothing follows."""
        return "" if self.seq is None else self.feed.address.inside(self.offset).cursor(self.seq).decode()


class Streams:
    """Open streams and serve them, for every protocol."""

    def __init__(
        self,
        feeds: Feeds,
        states: LogStates,
        supervisor: Supervisor,
        presence: Presence,
        lookups: Lookups,
        recent: RecentStarts,
    ) -> None:
        self._feeds = feeds
        self._states = states
        self._supervisor = supervisor
        self._presence = presence
        self._lookups = lookups
        self._recent = recent

    async def open(self, principal: Principal, options: ReadOptions) -> Stream:
        """Return a stream that can be served.

        Raises:
            Problem: the stream cannot be opened: 400, 403, 404, 410, 429 or 503.
        """
        self.check(principal, options.session)
        try:
            feed, position = await self._locate(principal.tenant, options)
        except DeliveryError as error:
            raise problem_of(error) from error
        except BrokerUnavailable as error:
            raise unreachable("the log") from error
        return Stream(feed, options, principal, *(position or (None, 0)))

    def check(self, principal: Principal, session: str) -> None:
        """Check that a principal may open a stream of a session now.

        Raises:
            Problem: 403, 429 or 503.
        """
        authorize(principal, "read", session)
        self._supervisor.check(principal)

    async def prepare(self, tenant: str, session: str) -> None:
        """Open the session's feed for a reader who comes in a moment; a failure is left to that reader."""
        with suppress(DeliveryError, BrokerUnavailable):
            await self._feeds.feed(tenant, session)

    async def serve(
        self,
        stream: Stream,
        send: Send,
        format_: Format,
        joined: Callable[[Subscriber], None] | None = None,
        caught_up: Callable[[Subscriber], None] | None = None,
    ) -> str:
        """Serve a stream to its end; return why it ended.

        ``send`` takes the messages of ``format_``. ``joined`` is called with the subscriber before anything is sent, so
        that the caller can stop it when the client leaves, and set its credit. ``caught_up``: see `Feed.serve`.

        Raises:
            ValueError: the stream has no ``seq``: nothing follows.
        """
        feed, options = stream.feed, stream.options
        if stream.seq is None:
            raise ValueError("a stream that has been read to its end cannot be served")
        subscriber = Subscriber(send, format_, options.generation, stream.seq, stream.offset, options.granularity)
        subscriber.until, subscriber.until_reason = self._supervisor.end_of(stream.principal.expires_at)
        with self._supervisor.supervise(stream.principal, subscriber):
            async with self._presence.listening(feed.tenant, feed.session, options.generation):
                if joined is not None:
                    joined(subscriber)
                return await feed.serve(subscriber, caught_up)

    async def _locate(self, tenant: str, options: ReadOptions) -> tuple[Feed, Position | None]:
        """Return the feed and the position after which to read; ``None`` when nothing follows."""
        record = recent = None
        if options.generation is not None:
            recent = self._recent.get(tenant, options.session, options.generation)
            record = (
                await self._lookups.require(tenant, options.session, options.generation)
                if recent is None
                else recent.record
            )
        feed = await self._feeds.feed(tenant, options.session, recent)
        if options.cursor is not None:
            position = await self._check(options.cursor, feed)
            if options.generation is None and position.seq <= feed.deleted_through:
                await self._require_anew(feed, position.seq)
            await feed.reach(position.seq + (position.offset > 0))
        else:
            if options.generation is None and feed.deleted_through:
                await self._require_anew(feed, feed.deleted_through)
            position = Position(await self._beginning(feed, options.generation, options.start, recent))
            if options.start.where != "live":
                if await self._has_expired(feed, record, position.seq):
                    raise CursorExpired(
                        f"generation {options.generation!r} has ended, and no event of it is kept any more"
                    )
                return feed, position
        if await self._has_expired(feed, record, position.seq):
            return feed, None
        if options.generation is not None and await self._ended(feed, options.generation, position.seq):
            return feed, None
        return feed, position

    async def _check(self, text: str, feed: Feed) -> Position:
        state = await self._states.state(feed.issuer.partition)
        try:
            cursor = check_cursor(text, feed.issuer, state.first_seq, max(state.last_seq, feed.last_seq))
        except CursorExpired:
            state = await self._states.state(feed.issuer.partition, fresh=True)
            cursor = check_cursor(text, feed.issuer, state.first_seq, max(state.last_seq, feed.last_seq))
        return Position(cursor.seq, cursor.offset)

    async def _has_expired(self, feed: Feed, record: GenerationRecord | None, seq: int) -> bool:
        """Return whether a generation has ended and no event of it is kept: a reader would wait forever."""
        if record is None or record.state not in ENDED or seq < feed.last_seq:
            return False
        reader = self._states.reader(feed.tenant, feed.session, feed.issuer.partition)
        return await reader.first_of(record.generation) is None

    async def _require_anew(self, feed: Feed, seq: int) -> None:
        """Check that reading after the stream sequence ``seq`` covers only generations started since the deletion.

        Raises:
            Deleted: deleted events would be read, or no generation was started since.
        """
        behind = seq >= feed.deleted_through
        if not behind or (feed.tail.end == 0 and not await self._lookups.of_session(feed.tenant, feed.session)):
            raise Deleted(f"session {feed.session!r} was deleted")

    async def _ended(self, feed: Feed, generation: str, seq: int) -> bool:
        reader = self._states.reader(feed.tenant, feed.session, feed.issuer.partition)
        return (await reader.before(generation, seq + 1)).ended

    async def _beginning(
        self, feed: Feed, generation: str | None, start: StartPosition, recent: RecentStart | None
    ) -> int:
        if start.where == "live":
            return feed.last_seq
        if generation is not None:
            span = feed.tail.spans.get(generation)
            if span is not None and span.first > feed.tail.floor:
                return span.first - 1
            if recent is not None and recent.issuer.prefix == feed.issuer.prefix:
                return recent.seq
            seen = feed.last_seq  # before the look-up: events stored meanwhile must not be skipped
            first = await self._states.reader(feed.tenant, feed.session, feed.issuer.partition).first_of(generation)
            return seen if first is None else first - 1
        return 0 if start.where == "start" else feed.latest_start()
