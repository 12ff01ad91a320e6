"""All feeds of a process: opened on demand, shared by their subscribers, closed when nobody listens any more."""

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final

import structlog

from schemas.cursor import CursorIssuer
from schemas.requests import DeletedSession
from services.delivery import metrics
from services.delivery.errors import TooBusy
from services.delivery.fanout.feed import Feed
from services.delivery.fanout.open_streams import Connections, End
from services.delivery.fanout.presence import Presence
from services.delivery.fanout.replay import replay
from services.delivery.fanout.subscriber import Subscriber
from services.delivery.formats.granularity import Place
from services.delivery.formats.tail import Entry
from services.delivery.limits import Limits
from services.delivery.log.partitions import Partitions
from services.delivery.log.read_cache import SharedReads
from services.delivery.log.reader import LogReader
from services.delivery.reports.counting import Accounts
from services.delivery.requests.deleted_sessions import DeletedSessions
from services.delivery.requests.start_limits import Starts
from services.kit.auth.principal import Principal
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable, StreamState
from services.kit.jetstream.logs import Logs
from services.kit.jetstream.storage import Storage
from services.kit.shutdown import end

__all__ = ["Hub"]

log = structlog.get_logger()
SWEEP_SECONDS: Final = 1.0
SETTLE_FEEDS_SECONDS: Final = 2.0
"""How often what was sent is counted for billing, while streams go on."""
STATE_SECONDS: Final = 1.0
CLOSE_SECONDS: Final = 0.5
"""How long the broker may take to hear that sessions are followed no more."""
SETTLE_SECONDS: Final = 60.0


class Hub:
    """Gives subscribers their feed, keeps streams alive, and ends them in order."""

    def __init__(self, broker: Broker, clock: Clock, partitions: int, limits: Limits) -> None:
        self.broker = broker
        self.clock = clock
        self.limits = limits
        self.draining = False
        self.logs = Logs(broker)
        self.storage = Storage(broker, "delivery")
        self._partitions = Partitions(broker, clock, partitions)
        self._history: tuple[int, ...] = ()  # of partition counts, when feeds were last looked at
        self._settled_at = 0.0
        self._feeds: dict[tuple[str, str], Feed] = {}  # bounded by limits.feeds
        self._opening: dict[tuple[str, str], asyncio.Task[Feed]] = {}
        self._states: dict[int, tuple[float, StreamState]] = {}
        self._shared = SharedReads(broker)
        self.accounts: Accounts | None = None  # where what was sent is counted for billing
        self._settled_feeds_at = 0.0
        self.deleted = DeletedSessions(broker, self.end_deleted)
        self.presence = Presence(broker)
        self.connections = Connections(
            total=limits.streams, tenant=limits.streams_per_tenant, key=limits.streams_per_key
        )
        self.starts = Starts(broker, clock, limits.starts)
        self._asking: dict[int, asyncio.Task[StreamState]] = {}  # of each partition, what is asked just now
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking: set[object] = set()  # at what: one look at a time at each, however long the broker takes
        broker.on_reconnect(self._reconnected)

    async def state(self, partition: int, *, fresh: bool = False) -> StreamState:
        """Return a partition's bounds and incarnation, at most a second old.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        now = self.clock.monotonic()
        known = self._states.get(partition)
        if known is not None and not fresh and now - known[0] < STATE_SECONDS:
            return known[1]
        if fresh:
            return await self._ask(partition)
        asking = self._asking.get(partition)
        if asking is None:
            asking = self._asking[partition] = asyncio.create_task(self._ask(partition))
            asking.add_done_callback(lambda task: self._answered(partition, task))
        return await asyncio.shield(asking)

    def _answered(self, partition: int, task: asyncio.Task[StreamState]) -> None:
        if self._asking.get(partition) is task:
            del self._asking[partition]
        if not task.cancelled():
            task.exception()  # whoever waits for it sees it; nobody may be left to

    async def _ask(self, partition: int) -> StreamState:
        now = self.clock.monotonic()
        state = await self.logs.state(partition)
        self._states[partition] = (now, state)
        metrics.LOG_USED.labels(str(partition)).set(state.used)
        return state

    async def partition(self, tenant: str, session: str) -> int:
        """Return the partition that keeps a session.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        feed = self._feeds.get((tenant, session))
        return feed.issuer.partition if feed is not None else await self._partitions.of(tenant, session)

    async def issuer(self, tenant: str, session: str) -> CursorIssuer:
        """Return what issues and recognises the cursors of a session."""
        partition = await self.partition(tenant, session)
        state = await self.state(partition)
        return CursorIssuer(partition, state.incarnation, tenant, session)

    async def end_deleted(self, deleted: DeletedSession) -> None:
        """Close the feed of a session that was deleted; its subscribers are told."""
        self._shared.forget(deleted.tenant, deleted.session)
        key = (deleted.tenant, deleted.session)
        if key in self._opening:  # it may have read what is about to be removed
            await asyncio.wait({self._opening[key]})
        feed = self._feeds.get(key)
        if feed is not None and feed.issuer.partition == deleted.partition and feed.deleted_through < deleted.through:
            await self._retire(feed, "the session was deleted", "deleted")

    async def feed(self, tenant: str, session: str) -> Feed:
        """Return the session's feed, opened.

        Raises:
            TooBusy: this process follows as many sessions as it may.
            BrokerUnavailable: the broker does not answer.
        """
        key = (tenant, session)
        feed = self._feeds.get(key)
        if feed is not None:
            if feed.idle_since is not None:
                feed.idle_since = self.clock.monotonic()
            if self._follows(feed, await self.state(feed.issuer.partition)):
                return feed
            await self._retire(feed)
        task = self._opening.get(key)
        if task is None:
            if len(self._feeds) + len(self._opening) >= self.limits.feeds:
                raise TooBusy(f"this replica follows {self.limits.feeds} sessions already")
            task = asyncio.create_task(self._open(tenant, session))
            self._opening[key] = task
            task.add_done_callback(lambda _: self._opening.pop(key, None))
        return await asyncio.shield(task)

    def reader(self, tenant: str, session: str, partition: int) -> LogReader:
        """Return a reader of a session's log for one subscriber."""
        known = self._states.get(partition)
        shared = None if known is None else self._shared  # what is kept must be of the incarnation that is there now
        return LogReader(self.broker, partition, tenant, session, shared, known[1].incarnation if known else "")

    async def catch_up(self, feed: Feed, subscriber: Subscriber) -> bool:
        """Serve a subscriber from the log until the feed's memory reaches back far enough for it.

        Returns whether the wanted generation has ended with what was sent.
        """
        metrics.REPLAYS.inc()
        reader = self.reader(feed.tenant, feed.session, feed.issuer.partition)
        while subscriber.seq < feed.floor(subscriber) and not subscriber.done.done():
            floor = feed.floor(subscriber)
            self.settle(feed, [subscriber])

            def counted(entries: Sequence[Entry]) -> None:
                if self.accounts is not None:
                    self.accounts.replayed(feed.tenant, feed.session, subscriber, entries)

            ended = await replay(reader, subscriber, feed.address, floor, counted)
            subscriber.accounted = subscriber.seq
            if ended:
                return True
            if not subscriber.done.done() and subscriber.seq < floor:
                subscriber.place = Place(floor)
                subscriber.accounted = floor
        return False

    def settle(self, feed: Feed, subscribers: Iterable[Subscriber]) -> None:
        """Count for billing what subscribers were sent from memory since the last time."""
        if self.accounts is not None:
            self.accounts.settle(feed.tenant, feed.session, feed.tail, subscribers)

    async def is_ready(self) -> bool:
        """Tell whether new streams can be opened."""
        return self.broker.is_connected and not self.draining

    def stream(self, principal: Principal, end: End) -> contextlib.AbstractContextManager[None]:
        """Count a stream as open while the block runs; `drain` waits for all of them.

        ``end`` is called with a reason when the principal's credentials are revoked.
        """
        return self.connections.held(principal, end)

    def set_end(self, subscriber: Subscriber, expires_at: float | None) -> None:
        """Set when a stream that begins now is to end; ``expires_at``: of its credentials, in seconds since 1970."""
        subscriber.until, subscriber.until_reason = self.end_of(expires_at)

    def end_of(self, expires_at: float | None) -> tuple[float, str]:
        """Return when what begins now is to end, in monotonic seconds, and why: ``lifetime`` or ``expired``."""
        now = self.clock.monotonic()
        until = now + self.limits.lifetime * random.uniform(0.8, 1.0)
        if expires_at is not None and now + expires_at - self.clock.wall() < until:
            return now + expires_at - self.clock.wall(), "expired"
        return until, "lifetime"

    async def run(self) -> None:
        """Keep streams alive and close what is idle; runs until cancelled."""
        self._look("deletions", self.deleted.listen)
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self._sweep(self.clock.monotonic())

    async def drain(self, seconds: float) -> None:
        """End every stream with a resumable notice; wait so long for slow clients."""
        self.draining = True
        for feed in self._feeds.values():
            for subscriber in feed.everyone():
                subscriber.finish("drain")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.connections.quiet.wait()
        closing = [asyncio.create_task(feed.close()) for feed in self._feeds.values()]
        if closing:  # the broker may take nothing any more
            await asyncio.wait(closing, timeout=CLOSE_SECONDS)
        await end(*closing, *self._tasks)

    async def _open(self, tenant: str, session: str) -> Feed:
        issuer = await self.issuer(tenant, session)
        feed = Feed(self.broker, self.clock, issuer, tenant, session, self.limits.feed_bytes)
        feed.deleted_through = await self.deleted.through(tenant, session, issuer)
        try:
            await feed.open()
        except BaseException:
            await feed.close()
            raise
        feed.idle_since = self.clock.monotonic()
        self._feeds[tenant, session] = feed
        metrics.FEEDS.set(len(self._feeds))
        return feed

    def _sweep(self, now: float) -> None:
        size = 0
        for key, feed in list(self._feeds.items()):
            size += feed.size
            if feed.idle_since is not None and now - feed.idle_since > self.limits.linger:
                del self._feeds[key]
                self._spawn(feed.close())
                continue
            if not feed.in_step and self.broker.is_connected:
                self._look(feed, self._reread, feed)
            elif feed.is_quiet(now) and self.broker.is_connected:
                self._look(feed, self._check, feed)
            for subscriber in feed.everyone():
                self._look_after(subscriber, now)
        if self.broker.is_connected:
            self._look("storage", self.storage.look)
            self._look("starts", self.starts.look)
            if not self.deleted.heard:
                self._look("deletions", self.deleted.listen)
            self._look("logs", self._look_for_new_logs)
            self._look("moves", self._look_for_moves, now)
        if now - self._settled_feeds_at >= SETTLE_FEEDS_SECONDS:
            self._settled_feeds_at = now
            for feed in self._feeds.values():
                self.settle(feed, feed.everyone())
        self._shared.sweep()
        metrics.FEEDS.set(len(self._feeds))
        metrics.FEED_BYTES.set(size)

    def _look_after(self, subscriber: Subscriber, now: float) -> None:
        if subscriber.blocked_at is not None:
            if now - subscriber.blocked_at > self.limits.stall:
                subscriber.finish("evicted")
        elif now > subscriber.until:
            subscriber.finish(subscriber.until_reason)
        elif now - subscriber.stand.at > self.limits.heartbeat and not subscriber.done.done():
            subscriber.touch(now)
            heartbeat = subscriber.format.heartbeat()
            if heartbeat is not None:
                subscriber.start(heartbeat)

    async def _reconnected(self) -> None:
        self._states.clear()
        self._asking.clear()  # what was asked over the lost connection is not answered any more
        for feed in list(self._feeds.values()):
            self._spawn(self._reread(feed))

    async def _reread(self, feed: Feed) -> None:
        """Look for what a feed has missed; a feed of a re-created log is closed, its subscribers are told."""
        partition = feed.issuer.partition
        try:
            if self._follows(feed, await self._known_state(partition, feed.last_seq)):
                if not await self._was_deleted(feed):
                    await feed.reread()
                return
        except BrokerUnavailable as error:
            log.warning("read-back failed, will be tried again", session=feed.session, detail=str(error))
            return
        await self._retire(feed)

    async def _known_state(self, partition: int, seen: int) -> StreamState:
        """Return a partition's state; a log that ends before ``seen`` begins a new era first.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        state = await self.state(partition)
        if seen > state.last_seq and seen > (state := await self.state(partition, fresh=True)).last_seq:
            await self.logs.report(partition, state.incarnation, seen)
            state = await self.state(partition, fresh=True)
        return state

    async def _check(self, feed: Feed) -> None:
        try:
            if not await self._was_deleted(feed):
                await feed.check()
        except BrokerUnavailable as error:
            log.warning("quiet feed not checked", session=feed.session, detail=str(error))

    async def _was_deleted(self, feed: Feed) -> bool:
        """Close a feed whose session was deleted without this replica hearing of it; tell whether it was."""
        if await self.deleted.through(feed.tenant, feed.session, feed.issuer) <= feed.deleted_through:
            return False
        await self._retire(feed, "the session was deleted", "deleted")
        return True

    async def _look_for_new_logs(self) -> None:
        """Close the feeds of a stream that was deleted and created anew: nothing that arrives would tell them."""
        bounded = {partition for partition, (_, state) in self._states.items() if state.used > 0}
        for partition in bounded | {feed.issuer.partition for feed in self._feeds.values()}:
            try:
                state = await self.state(partition)
            except BrokerUnavailable:
                continue
            for feed in list(self._feeds.values()):
                if feed.issuer.partition == partition and not self._follows(feed, state):
                    await self._retire(feed)

    async def _look_for_moves(self, now: float) -> None:
        """Close the feeds of sessions that another partition keeps from now on, as every replica will find.

        That happens when the number of partitions changes while nothing of a session is stored, and when the last of
        it has expired where an earlier number had put it.
        """
        try:
            history = await self._partitions.history()
            changed = history != self._history
            if not changed and (len(history) == 1 or now - self._settled_at < SETTLE_SECONDS):
                return
            self._history, self._settled_at = history, now
            for feed in list(self._feeds.values()):
                at = feed.issuer.partition
                if await self._partitions.is_settled(feed.tenant, feed.session, at):
                    continue
                if await self._partitions.of(feed.tenant, feed.session) != at:
                    await self._retire(feed, "the session is kept by another partition now")
        except BrokerUnavailable as error:
            log.warning("partitions not looked at", detail=str(error))

    @staticmethod
    def _follows(feed: Feed, state: StreamState) -> bool:
        issuer = CursorIssuer(feed.issuer.partition, state.incarnation, feed.tenant, feed.session)
        return issuer.incarnation == feed.issuer.incarnation

    async def _retire(self, feed: Feed, why: str = "the log was re-created", reason: str = "gap") -> None:
        """Close the feed of a log that is not the session's any more; its subscribers are told.

        Where a session was deleted, the subscribers of one generation are sent to ask again: theirs may be a new one.
        """
        if feed.closed:
            return
        log.warning("feed closed", session=feed.session, why=why)
        if self._feeds.get((feed.tenant, feed.session)) is feed:
            del self._feeds[feed.tenant, feed.session]
        for subscriber in feed.everyone():
            asks_again = reason == "deleted" and subscriber.generation is not None
            subscriber.finish("lifetime" if asks_again else reason)
        await feed.close()

    def _look(self, at: object, look: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        """Start to look at something, unless the look before has not ended: a slow broker is not asked ever more."""
        if at not in self._looking:
            self._looking.add(at)
            self._spawn(look(*arguments)).add_done_callback(lambda _: self._looking.discard(at))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
