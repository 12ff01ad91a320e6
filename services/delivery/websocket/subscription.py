"""Track one subscription of a WebSocket: its credit or window, and its events in flight."""

import asyncio
from collections.abc import Callable
from typing import Final

from services.delivery.fanout.flow_control import AutoWindow, InFlight, Released
from services.delivery.fanout.subscriber import Subscriber
from services.delivery.formats.frames import UNLIMITED
from services.delivery.formats.websocket import Outgoing
from services.delivery.formats.websocket_messages import CreditBody
from services.delivery.websocket.outbox import SocketOutbox
from services.kit.problem import Problem

__all__ = ["Subscription"]

WINDOW_LOW: Final = 16 * 1024
WINDOW_START: Final = 64 * 1024
WINDOW_HIGH: Final = 1024 * 1024
CREDIT_HIGH: Final = 2**53


class Subscription:
    """Read one session with ``credit``, with an ``auto`` window, or unlimited; ``clock`` returns monotonic seconds."""

    def __init__(
        self, outlet: SocketOutbox, clock: Callable[[], float], credit: CreditBody | None, *, auto: bool
    ) -> None:
        self._outlet = outlet
        self._clock = clock
        self._subscriber: Subscriber | None = None
        self._room = (credit and credit.events) or UNLIMITED
        self._space = (credit and credit.bytes) or UNLIMITED
        self._window = AutoWindow(WINDOW_LOW, WINDOW_HIGH, WINDOW_START) if auto else None
        if self._window is not None:
            self._space = self._window.size
        self._in_flight = InFlight() if auto or self.has_credit else None
        self._newest = 0
        self.unsubscribed = False
        self.task: asyncio.Task[None] | None = None

    @property
    def has_credit(self) -> bool:
        """Whether the client has limited the subscription by credit."""
        return self._window is None and (self._room != UNLIMITED or self._space != UNLIMITED)

    def joined(self, subscriber: Subscriber) -> None:
        """Attach the subscriber and limit it to the granted credit or window."""
        self._subscriber = subscriber
        subscriber.limit(self._room, self._space)

    async def send(self, message: Outgoing) -> None:
        """Send a message of the feed and record its events as in flight.

        Raises:
            ConnectionError: the socket is closed.
        """
        if message.events:
            self._newest = message.position
            if self._in_flight is not None:
                self._note(self._in_flight, message)
        await self._outlet.send(message.messages)

    def grant(self, events: int | None, size: int | None) -> None:
        """Add credit for more events and bytes.

        Raises:
            Problem: 409, the subscription has no credit.
        """
        if not self.has_credit:
            raise Problem(409, "this subscription has no credit to add to: give `credit` when you subscribe")
        self._limit(_more(self._now_room(), events), _more(self._now_space(), size))

    def acked(self, position: int) -> None:
        """Acknowledge all events up to a position, and return their credit or adapt the window.

        Raises:
            Problem: 409, the position is ahead of the last sent event.
        """
        if position > self._newest:
            raise Problem(409, "the cursor is ahead of what this subscription has been sent")
        released = self._in_flight.acked(position, self._clock()) if self._in_flight is not None else None
        if released is None:
            return
        if self._window is None:
            self._limit(_more(self._now_room(), released.events), _more(self._now_space(), released.size))
        else:
            self._resize(self._window, released)

    def trip(self, seconds: float) -> None:
        """Record the round trip time of a ping, in seconds."""
        if self._window is not None:
            self._window.trip(seconds)

    def stop(self, reason: str) -> None:
        """End the subscription; before it has joined, cancel its task."""
        if self._subscriber is not None:
            self._subscriber.stop(reason)
        elif self.task is not None:  # later: a task cancelled before its first step sends no end
            asyncio.get_running_loop().call_soon(self.task.cancel)

    def _note(self, in_flight: InFlight, message: Outgoing) -> None:
        filled = self._window is not None and self._window.is_filled(in_flight.size + message.size)
        in_flight.sent(message.position, message.events, message.size, self._clock(), filled=filled)

    def _resize(self, window: AutoWindow, released: Released) -> None:
        size = window.measured(released)
        assert self._in_flight is not None
        self._limit(UNLIMITED, size - self._in_flight.size)

    def _now_room(self) -> int:
        return self._room if self._subscriber is None else self._subscriber.room

    def _now_space(self) -> int:
        return self._space if self._subscriber is None else self._subscriber.space

    def _limit(self, room: int, space: int) -> None:
        self._room, self._space = room, space
        if self._subscriber is not None:
            self._subscriber.limit(room, space)


def _more(now: int, granted: int | None) -> int:
    return now if now == UNLIMITED or granted is None else min(now + granted, CREDIT_HIGH)
