"""Check that the log is still the one of the position in the database, and that its consumer delivers all of it."""

from typing import Final, NamedTuple

import structlog

from services.billing import metrics
from services.billing.adapters.ledger import Ledger, LogPosition
from services.billing.adapters.tail import LogState, Tail

__all__ = ["Begun", "Continuity"]

log = structlog.get_logger()
POLL_SECONDS: Final = 2.0
"""Seconds between comparisons of the log's end with the consumer's deliveries."""


class Begun(NamedTuple):
    """A partition taken: its incarnation, the applied position, and the stream sequence up to which to read directly
    first.
    """

    incarnation: str
    applied: int
    read_up_to: int


class Continuity:
    """Compare a partition's log, the broker's consumer of it, and the position in the ledger."""

    def __init__(self, partition: int, tail: Tail, ledger: Ledger) -> None:
        self._partition = partition
        self._tail = tail
        self._ledger = ledger
        self._polled_at = 0.0
        self._seen: tuple[int, int] | None = None  # position and the log's end at the last poll

    async def begin(self, now: int) -> Begun | None:
        """Take the partition at a valid position of the current log; return None while another process holds it.

        Raises:
            BrokerUnavailable: the broker does not answer.
            LedgerUnavailable: the database did not answer.
        """
        self._seen = None
        state = await self._tail.verify()
        before = await self._ledger.position(self._partition)
        applied = await self._ledger.acquire(self._partition, state.incarnation, now, base=state.base, lost=state.lost)
        if applied is None:
            return None
        is_new = before is not None and before.incarnation != state.incarnation
        if before is not None and is_new and before.applied:
            self._notify(before, state)
        if applied and not await self._continues(state, await self._ledger.position(self._partition)):
            return await self.begin(now)  # in the new incarnation
        delivered = state.delivered_seq
        if delivered > state.last_seq:
            await self._tail.reset(applied)
        return Begun(state.incarnation, applied, state.last_seq if is_new else min(delivered, state.last_seq))

    async def _continues(self, state: LogState, position: LogPosition | None) -> bool:
        """Return whether the log still holds the applied message at the position; if not, report a new incarnation."""
        if position is None or position.incarnation != state.incarnation:
            return True  # another process has taken it meanwhile: the next transaction fails
        stamp: int | None = None
        if position.stamp and position.applied <= state.last_seq:
            stamp = await self._tail.stamp(position.applied)
        if position.applied <= state.last_seq and stamp in (None, position.stamp):
            return True
        await self._tail.logs.report(self._partition, state.incarnation, position.applied, position.stamp)
        return False

    def _notify(self, before: LogPosition, state: LogState) -> None:
        # Losses in the middle are found and counted when they are read.
        unread = max(0, state.lost - max(before.applied, state.base)) if state.reused else 0
        metrics.GAP.labels(str(self._partition)).inc(unread)
        log.error(
            "the log was replaced or has lost its end, and is read again",
            partition=self._partition,
            applied=before.applied,
            kept_up_to=state.base,
            lost_unread=unread,
            ends_at=state.last_seq,
        )

    async def poll(self, incarnation: str, applied: int, now: float) -> int | None:
        """Return the stream sequence up to which to read the log because its consumer is stuck, or None if it is not.

        Call it between pulls; ``now`` in monotonic seconds. 0 means another incarnation: begin again.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        if now - self._polled_at < POLL_SECONDS:
            return None
        self._polled_at = now
        state = await self._tail.state()
        if state.incarnation != incarnation:
            return 0
        seen, self._seen = self._seen, (applied, state.last_seq)
        if seen is None or seen[0] != applied or seen[1] <= applied:
            return None
        log.error("the consumer did not deliver stored events", partition=self._partition, applied=applied)
        metrics.LAG.labels(str(self._partition)).set(seen[1] - applied)
        await self._tail.reset(seen[1])
        return seen[1]
