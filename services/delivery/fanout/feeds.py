"""Open the feeds of a replica on demand, share them among subscribers, and close them when idle."""

import asyncio
from typing import Final

import structlog

from schemas.cursor import CursorIssuer
from schemas.requests import DeletedSession
from services.delivery import metrics
from services.delivery.errors import TooBusy
from services.delivery.fanout.feed import Feed
from services.delivery.fanout.supervisor import Supervisor
from services.delivery.log.states import LogStates
from services.delivery.reports.counting import DeliveryCounts
from services.delivery.requests.deleted_sessions import DeletedSessions
from services.delivery.requests.recent_starts import RecentStart
from services.delivery.settings import Settings
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable, StreamState
from services.kit.shutdown import end
from services.kit.tasks import SingleFlight, together

__all__ = ["Feeds"]

log = structlog.get_logger()
COUNT_SECONDS: Final = 2.0
"""Seconds between two counts of delivered events for billing while streams are open."""
CLOSE_SECONDS: Final = 0.5
"""Seconds that the broker may take to end the feeds' subscriptions."""
MOVES_SECONDS: Final = 60.0
"""Seconds between two checks whether sessions have moved to another partition; a new partition count also checks."""


class Feeds:
    """Open one feed for each session read on this replica, and keep feeds in step with the log.

    A feed is closed when it had no subscriber for ``settings.linger`` seconds, when its log was re-created, when its
    session was deleted, and when another partition keeps the session now.
    """

    def __init__(
        self,
        broker: Broker,
        clock: Clock,
        states: LogStates,
        supervisor: Supervisor,
        deleted: DeletedSessions,
        settings: Settings,
        counts: DeliveryCounts | None = None,
    ) -> None:
        self._broker = broker
        self._clock = clock
        self._states = states
        self._supervisor = supervisor
        self._deleted = deleted
        self._settings = settings
        self._counts = counts
        self._feeds: dict[tuple[str, str], Feed] = {}  # bounded by settings.feeds
        self._opening: SingleFlight[tuple[str, str], Feed] = SingleFlight()
        self._history: tuple[int, ...] = ()  # of partition counts, when feeds were last checked against it
        self._moves_checked_at = 0.0
        self._counted_at = 0.0
        deleted.on_deleted(self.end_deleted)
        broker.on_reconnect(self._reconnected)
        supervisor.on_poll(self.sweep)
        supervisor.every_second("logs", self._check_logs)
        supervisor.every_second("moves", self._check_moves)

    def all(self) -> list[Feed]:
        """Return the open feeds."""
        return list(self._feeds.values())

    async def feed(self, tenant: str, session: str, start: RecentStart | None = None) -> Feed:
        """Return the session's feed; open it if needed. ``start``: a generation accepted here, if it is known.

        Raises:
            TooBusy: this replica follows ``settings.feeds`` sessions already.
            BrokerUnavailable: the broker does not answer.
        """
        key = (tenant, session)
        feed = self._feeds.get(key)
        if feed is not None:
            if feed.idle_since is not None:
                feed.idle_since = self._clock.monotonic()
            if _follows(feed, await self._states.state(feed.issuer.partition)):
                return feed
            await self._retire(feed)
        if key not in self._opening and len(self._feeds) + len(self._opening) >= self._settings.feeds:
            raise TooBusy(f"this replica follows {self._settings.feeds} sessions already")
        return await self._opening.run(key, lambda: self._open(tenant, session, start))

    async def end_deleted(self, deleted: DeletedSession) -> None:
        """Close the feed of a deleted session and end its subscribers."""
        self._states.forget(deleted.tenant, deleted.session)
        key = (deleted.tenant, deleted.session)
        await self._opening.wait(key)  # it may have read events that are about to be removed
        feed = self._feeds.get(key)
        if feed is not None and feed.issuer.partition == deleted.partition and feed.deleted_through < deleted.through:
            await self._retire(feed, "the session was deleted", "deleted")

    async def close(self) -> None:
        """Close all feeds; their subscribers must have been ended before."""
        closing = [asyncio.create_task(feed.close()) for feed in self._feeds.values()]
        if closing:  # the broker may not respond any more
            await asyncio.wait(closing, timeout=CLOSE_SECONDS)
        await end(*closing)

    def sweep(self, now: float) -> None:
        """Close idle feeds, reread feeds with a loss, check quiet feeds, and count; called about every second."""
        size = 0
        for feed in self.all():
            size += feed.size
            if feed.idle_since is not None and now - feed.idle_since > self._settings.linger:
                self._drop(feed)
                self._supervisor.start((feed, "close"), feed.close())
            elif not feed.in_step and self._broker.is_connected:
                self._supervisor.start(feed, self._reread(feed))
            elif feed.is_quiet(now) and self._broker.is_connected:
                self._supervisor.start(feed, self._check(feed))
        if now - self._counted_at >= COUNT_SECONDS:
            self._counted_at = now
            for feed in self._feeds.values():
                feed.count(feed.everyone())
        self._states.sweep()
        metrics.FEEDS.set(len(self._feeds))
        metrics.FEED_BYTES.set(size)

    async def _open(self, tenant: str, session: str, start: RecentStart | None) -> Feed:
        issuer = await self._states.issuer(tenant, session)
        # A session without events before a start needs no search for its latest and its running answers.
        is_known = start is not None and start.is_first and start.issuer.prefix == issuer.prefix
        after = start.seq if start is not None and is_known else None
        feed = Feed(self._broker, self._clock, self._states, issuer, tenant, session, self._settings, self._counts)
        try:
            feed.deleted_through, _ = await together(self._deleted.through(tenant, session, issuer), feed.open(after))
        except BaseException:
            await feed.close()
            raise
        feed.idle_since = self._clock.monotonic()
        self._feeds[tenant, session] = feed
        self._states.follow(tenant, session, issuer.partition)
        metrics.FEEDS.set(len(self._feeds))
        return feed

    async def _reconnected(self) -> None:
        self._states.reset()
        for feed in self.all():
            self._supervisor.start((feed, "reconnected"), self._reread(feed))

    async def _reread(self, feed: Feed) -> None:
        """Read the events that a feed has missed; close the feed and end its subscribers if its log was re-created."""
        try:
            if _follows(feed, await self._states.state_behind(feed.issuer.partition, feed.last_seq)):
                if not await self._was_deleted(feed):
                    await feed.reread()
                return
        except BrokerUnavailable as error:
            log.warning("read-back failed, will be tried again", session=feed.session, detail=str(error))
            return
        await self._retire(feed)

    async def _check(self, feed: Feed) -> None:
        try:
            if not await self._was_deleted(feed):
                await feed.check()
        except BrokerUnavailable as error:
            log.warning("quiet feed not checked", session=feed.session, detail=str(error))

    async def _was_deleted(self, feed: Feed) -> bool:
        """Close a feed whose session was deleted without notice to this replica; return whether it was."""
        if await self._deleted.through(feed.tenant, feed.session, feed.issuer) <= feed.deleted_through:
            return False
        await self._retire(feed, "the session was deleted", "deleted")
        return True

    async def _check_logs(self) -> None:
        """Refresh the states of the logs in use, and close the feeds of a log that was deleted and re-created."""
        for partition in self._states.bounded() | {feed.issuer.partition for feed in self._feeds.values()}:
            try:
                state = await self._states.state(partition, fresh=True)
            except BrokerUnavailable:
                continue
            for feed in self.all():
                if feed.issuer.partition == partition and not _follows(feed, state):
                    await self._retire(feed)

    async def _check_moves(self) -> None:
        """Close the feeds of sessions that another partition keeps now; every replica reaches the same result.

        A session moves when the number of partitions changes while it has no stored event, and when its last event
        expires in the partition of an earlier count.
        """
        now, partitions = self._clock.monotonic(), self._states.partitions
        try:
            history = await partitions.history()
            changed = history != self._history
            if not changed and (len(history) == 1 or now - self._moves_checked_at < MOVES_SECONDS):
                return
            self._history, self._moves_checked_at = history, now
            for feed in self.all():
                at = feed.issuer.partition
                if await partitions.is_settled(feed.tenant, feed.session, at):
                    continue
                if await partitions.of(feed.tenant, feed.session) != at:
                    await self._retire(feed, "the session is kept by another partition now")
        except BrokerUnavailable as error:
            log.warning("partitions not checked", detail=str(error))

    async def _retire(self, feed: Feed, why: str = "the log was re-created", reason: str = "gap") -> None:
        """Close a feed whose log is no longer the session's, and end its subscribers.

        After a deletion, subscribers of one generation are asked to reconnect: their generation may be a new one.
        """
        if feed.closed:
            return
        log.warning("feed closed", session=feed.session, why=why)
        self._drop(feed)
        for subscriber in feed.everyone():
            asks_again = reason == "deleted" and subscriber.generation is not None
            subscriber.stop("lifetime" if asks_again else reason)
        await feed.close()

    def _drop(self, feed: Feed) -> None:
        key = (feed.tenant, feed.session)
        if self._feeds.get(key) is feed:
            del self._feeds[key]
            self._states.unfollow(*key)


def _follows(feed: Feed, state: StreamState) -> bool:
    """Return whether a feed follows the current incarnation of its log."""
    issuer = CursorIssuer(feed.issuer.partition, state.incarnation, feed.tenant, feed.session)
    return issuer.incarnation == feed.issuer.incarnation
