"""The pull consumer: request messages from one durable consumer of the broker, and report the end of each pull.

A pull (``$JS.API.CONSUMER.MSG.NEXT.<stream>.<consumer>``) asks for up to ``batch`` messages. The server delivers them
to the pull's inbox, each under its own subject, with an acknowledgement subject as its reply subject (`ack`). A pull
that brings less than its batch ends with a status message, which has no reply subject. For all users a status means:

- 404 No Messages (of a pull that does not wait), 408 Request Timeout (of one that has waited): `End.EMPTY`.
- 409 Batch Completed, 409 Message Size Exceeds MaxBytes: `End.FULL`. The bound in bytes is reached, and more waits.
- 409 Consumer Deleted, 409 Consumer is push based, 503 No Responders: `End.GONE`. The user must check the consumer.
- Any other, such as 409 Exceeded MaxWaiting, 409 Leadership Change, 409 Server Shutdown: `End.REFUSED`.
- 100 Idle Heartbeat: no end. No pull asks for heartbeats: a pull waits for some seconds at most, and its end is a sign
  of life. One whose end is `PATIENCE` seconds late, or whose connection has been replaced, is lost.

After `End.GONE` and `End.REFUSED` a pull consumer pauses for `REST_SECONDS`: more pulls help neither a missing leader
nor too many waiting pulls. A status of an earlier pull is ignored. A message of an earlier pull that was considered
lost is kept, and counts for the current pull: a message does not name its pull.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any, Final

import msgspec

from services.kit.jetstream.client import parse_status
from services.kit.jetstream.connection import Connection, Subscription
from services.kit.jetstream.errors import AWAY, BrokerUnavailable

__all__ = ["PATIENCE", "Arrived", "End", "PullConsumer", "end_of"]

PATIENCE: Final = 2.0
"""Seconds after which a pull without an end is considered lost."""
REST_SECONDS: Final = 1.0
"""Seconds without a pull after a refused one."""

Arrived = tuple[bytes, bytes, bytes]
"""A delivered message: subject, acknowledgement subject, data."""


class End(Enum):
    """The end of a pull."""

    COMPLETE = "all that was asked for has come"
    EMPTY = "there is no more"
    FULL = "its bound in bytes is reached"
    GONE = "there is no such consumer"
    REFUSED = "it cannot be served now"


_ENDS: Final = {"404": End.EMPTY, "408": End.EMPTY, "503": End.GONE}
_CONFLICTS: Final = {
    "Batch Completed": End.FULL,
    "Message Size Exceeds MaxBytes": End.FULL,
    "Consumer Deleted": End.GONE,
    "Consumer is push based": End.GONE,
}


def end_of(status: str, description: str) -> End | None:
    """Map a status message to the end of a pull; ``None`` for a heartbeat, which does not end it."""
    if status == "100":
        return None
    return _ENDS.get(status) or _CONFLICTS.get(description, End.REFUSED)


class PullConsumer:
    """Pull from one durable consumer; at most one pull is open at a time.

    ``arrived`` holds the messages not taken yet, in delivery order: at most the batch of one pull, and as many again if
    a pull was wrongly considered lost. ``notify`` is called after each message and each end of a pull, from the parser:
    it must return quickly and never raise. Without it use `fetch`.

    ``end``: the end of the newest pull; ``None`` while it is open, and if it was lost. ``reason``: its status.
    """

    def __init__(self, broker: Connection, stream: str, durable: str, notify: Callable[[], None] | None = None) -> None:
        self.arrived: deque[Arrived] = deque()
        self.end: End | None = None
        self.reason = ""
        self._broker = broker
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}"
        self._notify = notify
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._number = 0
        self._reply = b""
        self._wanted = 0  # messages that the open pull may still bring; 0 or less: none is open
        self._waits = False
        self._has_ended = True  # whether the server has ended the newest pull
        self._lost_at = 0.0
        self._rests_until = 0.0
        self._connection = 0  # the connection of the newest pull
        self._ended = asyncio.Event()

    async def open(self) -> None:
        """Subscribe to deliveries; otherwise the first pull does it.

        Raises:
            BrokerUnavailable: the connection is closed.
        """
        if self._subscription is None:
            self._inbox = self._broker.client.new_inbox()
            self._subscription = await self._broker.listen_to_deliveries(f"{self._inbox}.*", self._receive)

    async def pull(self, batch: int, *, max_bytes: int = 0, wait: float = 0.0) -> None:
        """Request up to ``batch`` messages: available ones, or with ``wait`` also those that arrive within it.

        ``max_bytes``: bound of their total size, 0 for none; a larger message blocks the consumer.

        Raises:
            BrokerUnavailable: it cannot be sent.
        """
        await self.open()
        self._number += 1
        reply = f"{self._inbox}.{self._number}"
        self._reply = reply.encode()
        self._wanted, self._waits, self._has_ended, self.end = batch, wait > 0, False, None
        self._lost_at = asyncio.get_running_loop().time() + wait + PATIENCE
        self._connection = self._broker.reconnects
        self._ended.clear()
        query: dict[str, Any] = {"batch": batch}
        query |= {"max_bytes": max_bytes} if max_bytes else {}
        query |= {"expires": round(wait * 1e9)} if wait else {"no_wait": True}
        try:
            await self._broker.publish(self._next, msgspec.json.encode(query), reply=reply)
        except BrokerUnavailable:
            self.forget()
            raise

    async def fetch(self, batch: int, *, max_bytes: int = 0, wait: float = 0.0) -> deque[Arrived]:
        """Pull, wait for the end of the pull, and return its messages; `end` is ``None`` if the pull was lost.

        Raises:
            BrokerUnavailable: it cannot be sent.
        """
        await self.pull(batch, max_bytes=max_bytes, wait=wait)
        try:
            async with asyncio.timeout(wait + PATIENCE):
                await self._ended.wait()
        except TimeoutError:
            self.forget()
        arrived, self.arrived = self.arrived, deque()
        return arrived

    def is_open(self) -> bool:
        """Return whether a pull may still bring messages."""
        # The server drops the pulls of a connection that ends.
        return (
            self._wanted > 0
            and asyncio.get_running_loop().time() < self._lost_at
            and self._broker.reconnects == self._connection
        )

    def answering(self) -> int:
        """Return the number of messages that a pull without waiting may still bring; 0 after its end."""
        return self._wanted if not self._waits and self.is_open() else 0

    def may_pull(self) -> bool:
        """Return whether no pull is open and none was refused just now."""
        return not self.is_open() and asyncio.get_running_loop().time() >= self._rests_until

    def forget(self) -> None:
        """Consider the open pull lost, and its end unknown."""
        self._wanted = 0
        self.end = None
        self._ended.set()

    async def close(self, seconds: float) -> None:
        """Stop listening after the messages already sent by the server have arrived, at most ``seconds`` later.

        The server may just have answered an open pull; lost messages would be redelivered only after the consumer's
        ``ack_wait``. The messages are in ``arrived``. Closing again does nothing.
        """
        subscription, self._subscription = self._subscription, None
        if subscription is None:
            return
        with suppress(*AWAY):  # a closed connection has ended the subscription
            if self._has_ended:
                await self._broker.unlisten(subscription)
            else:
                await self._broker.leave(subscription, seconds)

    def _receive(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        if not reply:
            self._take_status(subject, headers or b"")
            return
        self.arrived.append((subject, reply, data))
        self._wanted -= 1
        if self._wanted == 0:
            self._finish(End.COMPLETE)
        elif self._notify is not None:
            self._notify()

    def _take_status(self, subject: bytes, headers: bytes) -> None:
        if subject != self._reply:
            return  # of an earlier pull
        status, description = parse_status(headers)
        end = end_of(status, description)
        if end is None:
            return
        self.reason = f"{status} {description}"
        if end in (End.GONE, End.REFUSED):
            self._rests_until = asyncio.get_running_loop().time() + REST_SECONDS
        self._finish(end)

    def _finish(self, end: End) -> None:
        self._wanted = 0
        self._has_ended = True
        self.end = end
        self._ended.set()
        if self._notify is not None:
            self._notify()
