"""Share reads of the log among clients that reconnect together at different positions."""

import asyncio
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Final, NamedTuple

from schemas.acceptance import Acceptance
from services.delivery import metrics
from services.kit.jetstream.broker import Broker, Stored

__all__ = ["LogKey", "ReadCache"]

KEEP_SECONDS: Final = 10.0
KEEP_BYTES: Final = 8 * 1024 * 1024
MESSAGE_BYTES: Final = 256  # overhead of a message beyond its data
LOGS: Final = 1_000
"""Bound of cached filters."""
POSITIONS: Final = 5_000
"""Bound of cached acceptance positions of one filter."""
ALIGNED: Final = 512
"""A shared read begins at a multiple of this stream sequence, so that the next reader can use it."""
AHEAD: Final = 1_000
"""Stream sequences that a shared read covers at least."""


class LogKey(NamedTuple):
    """Key of cached reads: a filter on a stream, and the incarnation of that stream."""

    stream: str
    incarnation: str
    filter: str


class _Segment(NamedTuple):
    """All messages of a filter with stream sequences from ``first`` to ``last``."""

    first: int
    last: int
    messages: list[Stored]
    size: int


class _Log:
    """Cache of one filter: disjoint segments, acceptance positions, and the read in flight."""

    __slots__ = ("positions", "reading", "segments", "used_at")

    def __init__(self) -> None:
        self.segments: list[_Segment] = []
        self.positions: list[tuple[int, Acceptance]] = []
        self.reading: asyncio.Task[_Segment] | None = None
        self.used_at = 0.0

    def covering(self, seq: int) -> _Segment | None:
        at = bisect_right(self.segments, seq, key=_first) - 1
        return self.segments[at] if at >= 0 and self.segments[at].last >= seq else None

    def around(self, seq: int) -> tuple[int, int | None]:
        """Return the first and last uncached sequence around ``seq``; the last is None if no segment follows."""
        at = bisect_right(self.segments, seq, key=_first)
        before = self.segments[at - 1].last + 1 if at else 1
        return before, self.segments[at].first - 1 if at < len(self.segments) else None


class ReadCache:
    """Read the log for subscribers that catch up: one read of a filter at a time, cached for ``keep`` seconds.

    Stored messages never change, so one read of a range serves all readers. At most ``max_bytes`` are kept; the least
    recently used are dropped first.
    """

    def __init__(self, broker: Broker, *, max_bytes: int = KEEP_BYTES, keep: float = KEEP_SECONDS) -> None:
        self._broker = broker
        self._max_bytes = max_bytes
        self._keep = keep
        self._bytes = 0
        self._logs: OrderedDict[LogKey, _Log] = OrderedDict()

    async def read(self, key: LogKey, from_seq: int, up_to: int) -> AsyncIterator[list[Stored]]:
        """Yield the stored messages from ``from_seq`` to ``up_to``, both included, in order and in batches.

        Raises:
            BrokerUnavailable: the log cannot be read.
        """
        from_seq, missed = max(1, from_seq), False
        while from_seq <= up_to:
            log = self._log(key)
            segment = log.covering(from_seq)
            # Start a read if none is in flight; after one that missed, at exactly this sequence.
            if segment is None and log.reading is None:
                start, end = self._range(log, from_seq, up_to, exact=missed)
                log.reading = asyncio.create_task(self._fetch(key, log, start, end, min(end, up_to)))
                log.reading.add_done_callback(_look_at)
                missed = True
            # Wait for the read in flight; it may belong to another reader and cover another range.
            if segment is None and log.reading is not None:
                segment = await asyncio.shield(log.reading)
                if not segment.first <= from_seq <= segment.last:
                    continue
            assert segment is not None
            messages = segment.messages
            batch = messages[bisect_left(messages, from_seq, key=_seq) : bisect_right(messages, up_to, key=_seq)]
            from_seq, missed = segment.last + 1, False
            if batch:
                yield batch

    def position(self, key: LogKey, seq: int) -> tuple[int, Acceptance]:
        """Return the nearest cached acceptance at or before ``seq``, preceded by the next sequence to read."""
        positions = self._log(key).positions
        at = bisect_right(positions, seq, key=_first_of_pair) - 1
        if at < 0:
            return 1, Acceptance()
        known_at, known = positions[at]
        return known_at, known.copy()

    def note(self, key: LogKey, seq: int, acceptance: Acceptance) -> None:
        """Cache the acceptance before the message ``seq``."""
        positions = self._log(key).positions
        at = bisect_left(positions, seq, key=_first_of_pair)
        if at < len(positions) and positions[at][0] == seq:
            return
        kept = acceptance.copy()
        kept.through = seq - 1
        positions.insert(at, (seq, kept))
        if len(positions) > POSITIONS:
            del positions[::2]

    def forget(self, tenant: str, session: str) -> None:
        """Drop the cached reads of a session."""
        for key in [key for key in self._logs if key.filter.split(".")[2:4] == [tenant, session]]:
            self._bytes -= sum(segment.size for segment in self._logs.pop(key).segments)

    def sweep(self) -> None:
        """Drop entries unused for ``keep`` seconds; to be called periodically."""
        due = asyncio.get_running_loop().time() - self._keep
        while self._logs and next(iter(self._logs.values())).used_at < due:
            self._drop()
        metrics.CATCH_UP_BYTES.set(self._bytes)

    def _log(self, key: LogKey) -> _Log:
        log = self._logs.get(key)
        if log is None:
            log = self._logs[key] = _Log()
            if len(self._logs) > LOGS:
                self._drop()
        else:
            self._logs.move_to_end(key)
        log.used_at = asyncio.get_running_loop().time()
        return log

    def _drop(self) -> None:
        _, log = self._logs.popitem(last=False)
        self._bytes -= sum(segment.size for segment in log.segments)

    @staticmethod
    def _range(log: _Log, seq: int, up_to: int, *, exact: bool) -> tuple[int, int]:
        """Return the range to read for ``seq``, without cached sequences; it reaches ``seq`` or a sequence before it.

        With other readers the range is wider than requested: they need the neighbouring messages next.
        """
        before, behind = log.around(seq)
        alone = not log.segments
        start = seq if exact or alone else max(before, seq - seq % ALIGNED)
        end = up_to if alone else max(up_to, start + AHEAD)
        return start, end if behind is None else min(end, behind)

    async def _fetch(self, key: LogKey, log: _Log, start: int, end: int, stored: int) -> _Segment:
        """Read one batch. All messages up to ``stored`` exist, so an empty result means an empty range."""
        metrics.CATCH_UP_READS.inc()
        try:
            segment = _Segment(start, stored, [], MESSAGE_BYTES)
            batches = self._broker.read(key.stream, key.filter, start, up_to=end)
            async for batch in batches:
                size = sum(len(message.data) + MESSAGE_BYTES for message in batch)
                segment = _Segment(start, batch[-1].seq, batch, size)
                break
            await batches.aclose()  # type: ignore[attr-defined]  # it is a generator
        finally:
            log.reading = None
        if self._logs.get(key) is log:
            insort(log.segments, segment, key=_first)
            self._bytes += segment.size
            self._shrink(log)
        return segment

    def _shrink(self, newest: _Log) -> None:
        while self._bytes > self._max_bytes and next(iter(self._logs.values())) is not newest:
            self._drop()
        while self._bytes > self._max_bytes and newest.segments:
            self._bytes -= newest.segments.pop(0).size


def _look_at(task: asyncio.Task[_Segment]) -> None:
    """Retrieve a failed read's exception, which may have no waiter left."""
    if not task.cancelled():
        task.exception()


def _first(segment: _Segment) -> int:
    return segment.first


def _seq(stored: Stored) -> int:
    return stored.seq


def _first_of_pair(pair: tuple[int, Acceptance]) -> int:
    return pair[0]
