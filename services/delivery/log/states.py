"""Cache the bounds and incarnations of the log's partitions, and find the partition of a session."""

from typing import Final

from schemas.cursor import CursorIssuer
from services.delivery import metrics
from services.delivery.log.partitions import Partitions
from services.delivery.log.read_cache import ReadCache
from services.delivery.log.reader import LogReader
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, StreamState
from services.kit.jetstream.logs import Logs
from services.kit.tasks import SingleFlight

__all__ = ["LogStates"]

STATE_SECONDS: Final = 2.0
"""Age in seconds up to which a partition's state is reused; those in use are read again every second."""


class LogStates:
    """Cache the state of each partition, and make readers and cursor issuers from it.

    ``partitions``: the history of partition counts. One request for a partition's state is in flight at a time;
    all callers await the same one.
    """

    def __init__(self, broker: Broker, clock: Clock, partitions: int) -> None:
        self.partitions = Partitions(broker, clock, partitions)
        self._broker = broker
        self._clock = clock
        self._logs = Logs(broker)
        self._states: dict[int, tuple[float, StreamState]] = {}  # by partition
        self._requests: SingleFlight[int, StreamState] = SingleFlight()  # by partition
        self._followed: dict[tuple[str, str], int] = {}  # partitions of sessions with a feed; bounded by the feeds
        self._cache = ReadCache(broker)

    async def state(self, partition: int, *, fresh: bool = False) -> StreamState:
        """Return a partition's bounds and incarnation, at most `STATE_SECONDS` old.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        now = self._clock.monotonic()
        known = self._states.get(partition)
        if known is not None and not fresh and now - known[0] < STATE_SECONDS:
            return known[1]
        if fresh:
            return await self._ask(partition)
        return await self._requests.run(partition, lambda: self._ask(partition))

    async def state_behind(self, partition: int, seen: int) -> StreamState:
        """Return a partition's state; start a new incarnation first if its log ends before the sequence ``seen``.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        state = await self.state(partition)
        if seen > state.last_seq and seen > (state := await self.state(partition, fresh=True)).last_seq:
            await self._logs.report(partition, state.incarnation, seen)
            state = await self.state(partition, fresh=True)
        return state

    async def partition(self, tenant: str, session: str) -> int:
        """Return the partition that keeps a session.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        followed = self._followed.get((tenant, session))
        return await self.partitions.of(tenant, session) if followed is None else followed

    async def issuer(self, tenant: str, session: str) -> CursorIssuer:
        """Return the issuer of a session's cursors.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        partition = await self.partition(tenant, session)
        state = await self.state(partition)
        return CursorIssuer(partition, state.incarnation, tenant, session)

    def reader(self, tenant: str, session: str, partition: int) -> LogReader:
        """Return a reader of a session's log for one subscriber."""
        known = self._states.get(partition)
        # Cached reads are valid only for the incarnation that is there now.
        cache, incarnation = (None, "") if known is None else (self._cache, known[1].incarnation)
        return LogReader(self._broker, partition, tenant, session, cache, incarnation)

    def follow(self, tenant: str, session: str, partition: int) -> None:
        """Record the partition of a session that has a feed from now on."""
        self._followed[tenant, session] = partition

    def unfollow(self, tenant: str, session: str) -> None:
        """Remove the recorded partition of a session without a feed."""
        self._followed.pop((tenant, session), None)

    def forget(self, tenant: str, session: str) -> None:
        """Drop cached reads of a session."""
        self._cache.forget(tenant, session)

    def bounded(self) -> set[int]:
        """Return the partitions whose log has a size limit and is not empty."""
        return {partition for partition, (_, state) in self._states.items() if state.used > 0}

    def reset(self) -> None:
        """Drop all states after a reconnect: requests over the lost connection get no answer."""
        self._states.clear()
        self._requests.forget()

    def sweep(self) -> None:
        """Drop cached reads unused for a while; to be called about every second."""
        self._cache.sweep()

    async def _ask(self, partition: int) -> StreamState:
        now = self._clock.monotonic()
        state = await self._logs.state(partition)
        self._states[partition] = (now, state)
        metrics.LOG_USED.labels(str(partition)).set(state.used)
        return state
