"""One subscription of a WebSocket: one session, read with credit, with a window or without a limit."""

import asyncio
from collections.abc import Callable
from typing import Any

from services.delivery.fanout.flow_control import FlowControl
from services.delivery.fanout.outbox import Outbox
from services.delivery.fanout.subscriber import Subscriber
from services.delivery.formats.websocket import Outgoing
from services.delivery.formats.websocket_messages import CreditBody

__all__ = ["Subscription"]


class Subscription:
    """Send one session over a socket, within the credit or window of ``flow``.

    Raises:
        Problem: 400, both ``credit`` and ``auto``.
    """

    def __init__(
        self, outbox: Outbox[dict[str, Any]], clock: Callable[[], float], credit: CreditBody | None, *, auto: bool
    ) -> None:
        self._outbox = outbox
        events, size = (None, None) if credit is None else (credit.events, credit.bytes)
        self.flow = FlowControl(clock, events, size, auto=auto)
        self._subscriber: Subscriber | None = None
        self.unsubscribed = False
        self.task: asyncio.Task[None] | None = None

    def joined(self, subscriber: Subscriber) -> None:
        """Limit the subscriber to the credit granted so far."""
        self._subscriber = subscriber
        self.flow.join(subscriber)

    async def send(self, message: Outgoing) -> None:
        """Queue a write of the feed.

        Raises:
            ConnectionError: the socket is closed.
        """
        if message.events:
            self.flow.sent(message.position, message.events, message.size)
        await self._outbox.send(message.messages)

    def stop(self, reason: str) -> None:
        """End the subscription; one that is still being opened is cancelled."""
        if self._subscriber is not None:
            self._subscriber.stop(reason)
        elif self.task is not None:  # not at once: a task cancelled before its first step sends no end
            asyncio.get_running_loop().call_soon(self.task.cancel)
