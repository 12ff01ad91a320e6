"""What a client has been sent and has not acknowledged, and how much of that there may be."""

from collections import deque
from typing import Final, NamedTuple

__all__ = ["AutoWindow", "InFlight", "Released"]

RECORDS: Final = 1_024
RATES: Final = 10
STALE_SECONDS: Final = 10.0
GAIN: Final = 2.0
FULL: Final = 0.75


class _Sent(NamedTuple):
    """One write: up to which place, events and bytes in all; when, and what was acknowledged by then."""

    place: int
    events: int
    size: int
    at: float
    acked: int
    acked_at: float
    filled: bool


class Released(NamedTuple):
    """What an acknowledgement frees: events and bytes, the seconds it took, and the bytes acknowledged per second.

    ``filled``: the window was used up meanwhile, so that the rate is the client's and not the session's. ``at``: when
    it came.
    """

    events: int
    size: int
    trip: float
    rate: float
    filled: bool
    at: float


class InFlight:
    """Events and bytes between sending and acknowledgement, as running totals. At most `RECORDS` writes are kept apart.

    Places are numbers that grow with the cursors of a session.
    """

    def __init__(self) -> None:
        self._sent: deque[_Sent] = deque()
        self._events = self._size = 0
        self._acked_events = self._acked_size = 0
        self._acked_at = 0.0  # when that was, or when the first of what is in flight was sent

    @property
    def size(self) -> int:
        """Bytes that are not acknowledged."""
        return self._size - self._acked_size

    def sent(self, place: int, events: int, size: int, now: float, *, filled: bool = False) -> None:
        """Note a write that brought the client up to ``place``."""
        self._events += events
        self._size += size
        if not self._sent:
            self._acked_at = now
        record = _Sent(place, self._events, self._size, now, self._acked_size, self._acked_at, filled)
        if len(self._sent) >= RECORDS:
            last = self._sent.pop()  # acknowledged together: the older time makes the trip longer, never shorter
            record = last._replace(place=place, events=self._events, size=self._size, filled=last.filled or filled)
        self._sent.append(record)

    def acked(self, place: int, now: float) -> Released | None:
        """Note that all up to ``place`` has been dealt with; ``None`` when that is nothing new."""
        newest = None
        while self._sent and self._sent[0].place <= place:
            newest = self._sent.popleft()
        if newest is None:
            return None
        events, size = newest.events - self._acked_events, newest.size - self._acked_size
        self._acked_events, self._acked_size, self._acked_at = newest.events, newest.size, now
        rate = (newest.size - newest.acked) / max(now - newest.acked_at, 1e-6)
        return Released(events, size, max(now - newest.at, 1e-6), rate, newest.filled, now)


class AutoWindow:
    """A window in bytes that follows what the client deals with in a round trip (rate times trip), with room to grow.

    The trip is the shortest one seen: waiting in a queue is no reason for a longer queue. When that is `STALE_SECONDS`
    ago, the window is closed to its lower bound until the queue is gone, and the trip is measured anew. The rate is the
    highest of the last `RATES` during which the window was used up; a session that says little leaves it as it is.
    """

    def __init__(self, low: int, high: int, start: int) -> None:
        self.size = start
        self._low = low
        self._high = high
        self._rates: deque[float] = deque(maxlen=RATES)
        self._trip = float("inf")
        self._trip_at = 0.0
        self._probe: float | None = None  # what is sent from then on meets no queue
        self._settled_at = 0.0  # what was sent before met a closed window

    def is_filled(self, in_flight: int) -> bool:
        """Tell whether so many bytes use the window up."""
        return in_flight >= FULL * self.size

    def measured(self, released: Released) -> int:
        """Take one measurement; return the window's new size in bytes."""
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
        """Take one round trip that was measured otherwise, by a ping."""
        self._trip = min(self._trip, max(seconds, 1e-6))
