"""Track the events in flight to a client, and compute the window that bounds them."""

from collections import deque
from typing import Final, NamedTuple

__all__ = ["AutoWindow", "InFlight", "Released"]

RECORDS: Final = 1_024
RATES: Final = 10
STALE_SECONDS: Final = 10.0
GAIN: Final = 2.0
FULL: Final = 0.75


class _Sent(NamedTuple):
    """One write: its place, total events and bytes, its time, and the bytes acknowledged by then."""

    position: int
    events: int
    size: int
    at: float
    acked: int
    acked_at: float
    filled: bool


class Released(NamedTuple):
    """Credit freed by an acknowledgement: events, bytes, round trip in seconds, and acknowledged bytes per second.

    ``filled``: the window was full meanwhile, so the rate is limited by the client, not by the session. ``at``: time
    of the acknowledgement.
    """

    events: int
    size: int
    trip: float
    rate: float
    filled: bool
    at: float


class InFlight:
    """Track events and bytes sent and not acknowledged, as running totals. Keeps at most `RECORDS` separate writes.

    Places are numbers that grow with the cursors of a session.
    """

    def __init__(self) -> None:
        self._sent: deque[_Sent] = deque()
        self._events = self._size = 0
        self._acked_events = self._acked_size = 0
        self._acked_at = 0.0  # time of the last acknowledgement, or of the first write in flight

    @property
    def size(self) -> int:
        """Bytes in flight."""
        return self._size - self._acked_size

    def sent(self, position: int, events: int, size: int, now: float, *, filled: bool = False) -> None:
        """Record a write that brought the client up to ``position``."""
        self._events += events
        self._size += size
        if not self._sent:
            self._acked_at = now
        record = _Sent(position, self._events, self._size, now, self._acked_size, self._acked_at, filled)
        if len(self._sent) >= RECORDS:
            last = self._sent.pop()  # merged: the older time makes the trip longer, never shorter
            record = last._replace(
                position=position, events=self._events, size=self._size, filled=last.filled or filled
            )
        self._sent.append(record)

    def acked(self, position: int, now: float) -> Released | None:
        """Record an acknowledgement up to ``position``; return the freed credit, or ``None`` if it frees nothing."""
        newest = None
        while self._sent and self._sent[0].position <= position:
            newest = self._sent.popleft()
        if newest is None:
            return None
        events, size = newest.events - self._acked_events, newest.size - self._acked_size
        self._acked_events, self._acked_size, self._acked_at = newest.events, newest.size, now
        rate = (newest.size - newest.acked) / max(now - newest.acked_at, 1e-6)
        return Released(events, size, max(now - newest.at, 1e-6), rate, newest.filled, now)


class AutoWindow:
    """Size a window in bytes to the client's bandwidth-delay product (rate times trip), times `GAIN`.

    The trip is the shortest one measured, so that queueing does not lengthen the queue. When that is `STALE_SECONDS`
    old, the window shrinks to its lower bound until the queue has drained, and the trip is measured again. The rate is
    the highest of the last `RATES` measured with a full window; a session with few events leaves it unchanged.
    """

    def __init__(self, low: int, high: int, start: int) -> None:
        self.size = start
        self._low = low
        self._high = high
        self._rates: deque[float] = deque(maxlen=RATES)
        self._trip = float("inf")
        self._trip_at = 0.0
        self._probe: float | None = None  # writes sent from this time on meet no queue
        self._settled_at = 0.0  # writes sent before this time met a shrunk window

    def is_filled(self, in_flight: int) -> bool:
        """Return whether ``in_flight`` bytes fill the window."""
        return in_flight >= FULL * self.size

    def measured(self, released: Released) -> int:
        """Apply one measurement; return the window's new size in bytes."""
        sent_at = released.at - released.trip
        if self._probe is not None:
            if sent_at < self._probe:
                return self.size
            self._trip, self._trip_at, self._settled_at = released.trip, released.at, released.at
            self._probe = None
        elif released.trip <= self._trip:
            self._trip, self._trip_at = released.trip, released.at
        elif released.filled and released.at - self._trip_at > STALE_SECONDS:
            self._probe, self.size = released.at + released.trip, self._low
            return self.size
        if sent_at >= self._settled_at and (released.filled or released.rate > max(self._rates, default=released.rate)):
            self._rates.append(released.rate)
        if self._rates:
            wanted = GAIN * max(self._rates) * self._trip
            self.size = int(min(max(wanted, self._low), self._high))
        return self.size

    def trip(self, seconds: float) -> None:
        """Apply a round trip in seconds measured by a ping."""
        self._trip = min(self._trip, max(seconds, 1e-6))
