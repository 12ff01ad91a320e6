"""Limit the events in flight to a client: credit that it grants, or a window sized to its bandwidth."""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

from services.delivery.fanout.subscriber import Subscriber
from services.delivery.formats.frames import UNLIMITED
from services.kit.problem import Problem

__all__ = ["AutoWindow", "CreditCount", "FlowControl", "InFlight", "Released"]

WINDOW_LOW: Final = 16 * 1024
WINDOW_START: Final = 64 * 1024
WINDOW_HIGH: Final = 1024 * 1024
CREDIT_HIGH: Final = 2**53
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


class FlowControl:
    """Limit what one subscription may be sent.

    ``events`` and ``size``: credit to begin with, in events and bytes; `grant` and acknowledgements add to it, and 0 or
    ``None`` leaves that side unlimited. ``auto``: a window sized by measurement instead. Without any of them a client
    is sent events as fast as it reads. ``clock`` returns monotonic seconds.

    Raises:
        Problem: 400, both credit and a window.
    """

    def __init__(self, clock: Callable[[], float], events: int | None, size: int | None, *, auto: bool) -> None:
        self._clock = clock
        self._subscriber: Subscriber | None = None
        self._room = min(events, CREDIT_HIGH) if events else UNLIMITED
        self._space = min(size, CREDIT_HIGH) if size else UNLIMITED
        self._has_credit = self._room != UNLIMITED or self._space != UNLIMITED
        if auto and self._has_credit:
            raise Problem(400, "a subscription has either credit or an automatic window")
        self._window = AutoWindow(WINDOW_LOW, WINDOW_HIGH, WINDOW_START) if auto else None
        if self._window is not None:
            self._space = self._window.size
        self._in_flight = InFlight() if auto or self._has_credit else None
        self._newest = 0

    def join(self, subscriber: Subscriber) -> None:
        """Limit ``subscriber`` to the credit granted so far."""
        self._subscriber = subscriber
        subscriber.limit(self._room, self._space)

    def sent(self, position: int, events: int, size: int) -> None:
        """Record a write that brought the client up to ``position``, a number that grows with the cursors."""
        self._newest = position
        if self._in_flight is not None:
            filled = self._window is not None and self._window.is_filled(self._in_flight.size + size)
            self._in_flight.sent(position, events, size, self._clock(), filled=filled)

    def grant(self, events: int | None, size: int | None) -> None:
        """Add credit in events and bytes.

        Raises:
            Problem: 409, the subscription has no credit to add to.
        """
        if not self._has_credit:
            raise Problem(409, "this subscription has no credit to add to: give `credit` when you subscribe")
        subscriber = self._subscriber
        room, space = (self._room, self._space) if subscriber is None else (subscriber.room, subscriber.space)
        self._limit(_more(room, events or 0), _more(space, size or 0))

    def acked(self, position: int) -> None:
        """Free the credit or window of the events up to ``position``, which the client acknowledged.

        Raises:
            Problem: 409, the client has not been sent ``position`` yet.
        """
        if position > self._newest:
            raise Problem(409, "the cursor is ahead of what this subscription has been sent")
        if self._in_flight is None:
            return
        released = self._in_flight.acked(position, self._clock())
        if released is None:
            return
        if self._window is None:
            self.grant(released.events, released.size)
        else:
            self._limit(UNLIMITED, self._window.measured(released) - self._in_flight.size)

    def trip(self, seconds: float) -> None:
        """Apply a round trip in seconds measured by a ping."""
        if self._window is not None:
            self._window.trip(seconds)

    def _limit(self, room: int, space: int) -> None:
        self._room, self._space = room, space
        if self._subscriber is not None:
            self._subscriber.limit(room, space)


class CreditCount:
    """Count the events that a client may still be given; ``None`` sets no limit."""

    def __init__(self, events: int | None) -> None:
        self.room = events
        self._changed = asyncio.Event()
        self._closed = False

    def grant(self, events: int) -> None:
        """Add credit.

        Raises:
            Problem: 409, there is no credit to add to.
        """
        if self.room is None:
            raise Problem(409, "this consumer is read without credit: give `credit` when you begin")
        self.room = _more(self.room, events)
        self._changed.set()

    def take(self, events: int) -> None:
        """Use up credit."""
        if self.room is not None:
            self.room -= events

    def close(self) -> None:
        """End all waits for credit."""
        self._closed = True
        self._changed.set()

    async def wait(self, seconds: float | None) -> bool:
        """Wait for credit, for ``seconds`` at most; return whether there is some and it is not closed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.room == 0 and not self._closed:
                    self._changed.clear()
                    await self._changed.wait()
        return self.room != 0 and not self._closed


def _more(now: int, granted: int) -> int:
    return now if now == UNLIMITED else min(now + granted, CREDIT_HIGH)
