"""nats-py's client with a fast path in and out for the few subjects that carry tokens.

The library gives every subscription a queue and a task, parses all headers of each message into a dictionary, and
validates the subject of each publish. On the relay path that is a third of a process's time. `RelayClient` passes the
messages of chosen subscriptions straight from the parser to a plain function, and writes prepared publishes straight
into the library's outgoing buffer. Everything else, above all reconnection, is the library's. It depends on internals
of nats-py, so the version is pinned closely, and `tests/contracts/kit/test_nats_client.py` checks them.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

__all__ = [
    "Arrival",
    "Delivery",
    "RelayClient",
    "Reply",
    "header_number",
    "heeding",
    "parse_headers",
    "parse_status",
]

T = TypeVar("T")

Arrival = Callable[[str, bytes, bytes], None]
"""A function of subject, data, and raw headers (empty without any). It must return quickly and never raise."""

Delivery = Callable[[bytes, bytes, bytes, bytes | None], None]
"""A function of subject, reply subject, data, and raw headers (``None`` without any), all as they came."""

Reply = Callable[[bytes, bytes | None], None]
"""A function of data and raw headers of one answer. It must return quickly and never raise."""

FLUSH_SECONDS: Final = 0.001
"""Shortest time between two writes of `send`: a message sent sooner waits for the next write.

A write costs about as much as ten messages in it. A publish after a pause is written at once.
"""
_CRLF: Final = b"\r\n"
_PING: Final = b"PING\r\n"


def header_number(headers: bytes, name: bytes) -> int | None:
    """Return the number of header ``name`` (with its colon and space) in a raw header block, or None."""
    start = headers.find(name)
    if start < 0:
        return None
    start += len(name)
    try:
        return int(headers[start : headers.index(_CRLF, start)])
    except ValueError:
        return None


def parse_headers(block: bytes) -> dict[str, str]:
    """Parse a raw header block; the last value of a repeated name wins."""
    found: dict[str, str] = {}
    for line in block.split(_CRLF)[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            found[name.strip().decode(errors="replace")] = value.strip().decode(errors="replace")
    return found


def _all_fields(block: bytes) -> dict[str, str]:
    """Return the fields of a raw header block with its status, named as the library names them."""
    fields = parse_headers(block)
    status, description = parse_status(block)
    if status:
        fields["Status"] = status
        if description:
            fields["Description"] = description
    return fields


def parse_status(block: bytes) -> tuple[str, str]:
    """Parse status and description of a raw header block, such as ``NATS/1.0 404 No Messages``; empty without any."""
    _, _, line = block.split(_CRLF, 1)[0].partition(b" ")
    status, _, description = line.decode(errors="replace").strip().partition(" ")
    return status, description.strip()


class RelayClient(Client):
    """A NATS client with `listen` and `send` reduced to the needs of the relay path."""

    def __init__(self) -> None:
        super().__init__()
        self._arrivals: dict[int, Arrival] = {}
        self._deliveries: dict[int, Delivery] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flush_due = False
        self._flushed_at = 0.0
        self._replies: dict[bytes, Reply] = {}  # by the last token of their subject; bounded by the requests under way
        self._reply_prefix = b""
        self._replies_opening = asyncio.Lock()
        self._requests = 0

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # Without TLS on the server, the library would continue in plain text and send it the password.
        if initial_connection and self.options.get("tls") is not None and not info.get("tls_required"):
            raise nats.errors.Error("this server offers no TLS, which is required")
        await super()._process_info(info, initial_connection)

    async def ask(self, subject: str, payload: bytes, receive: Reply, headers: dict[str, str] | None = None) -> bytes:
        """Send a request whose answers, one or more, go to ``receive``; return the token to end it with `forget`.

        All requests share one subscription; the library would make one for each read of several messages.
        """
        if not self._reply_prefix:
            await self._listen_to_replies()
        self._requests += 1
        token = b"%d" % self._requests
        self._replies[token] = receive
        try:
            await self.publish(subject, payload, reply=(self._reply_prefix + token).decode(), headers=headers)
        except BaseException:
            del self._replies[token]
            raise
        return token

    def forget(self, token: bytes) -> None:
        """Take no more answers to a request of `ask`."""
        self._replies.pop(token, None)

    async def _listen_to_replies(self) -> None:
        async with self._replies_opening:
            if self._reply_prefix:
                return
            prefix = b"%b.%b." % (bytes(self._inbox_prefix), bytes(self._nuid.next()))
            size = len(prefix)

            def deliver(subject: bytes, _reply: bytes, data: bytes, headers: bytes | None) -> None:
                receive = self._replies.get(bytes(subject[size:]))
                if receive is not None:
                    receive(data, headers)

            await self.listen_to_deliveries((prefix + b"*").decode(), deliver)
            self._reply_prefix = prefix

    async def _request_new_style(
        self, subject: str, payload: bytes, timeout: float = 1, headers: dict[str, Any] | None = None
    ) -> Msg:
        # The library's way costs twice as much: random names, a task for the timeout, headers parsed in any case.
        if self.is_draining_pubs:
            raise nats.errors.ConnectionDrainingError
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[tuple[bytes, bytes | None]] = loop.create_future()

        def receive(data: bytes, block: bytes | None) -> None:
            if not answered.done():
                answered.set_result((data, block))

        def expire() -> None:
            if not answered.done():
                answered.set_exception(nats.errors.TimeoutError())

        token = await self.ask(subject, payload, receive, headers)
        expiry = loop.call_later(timeout, expire)
        try:
            data, block = await answered
        finally:
            expiry.cancel()
            self.forget(token)
        return Msg(_client=self, subject=subject, data=data, headers=_all_fields(block) if block else None)

    async def flush(self, *args: Any, **kwargs: Any) -> None:
        """Flush as the library does, without losing a coincident cancellation."""
        await heeding(super().flush(*args, **kwargs))

    async def _attempt_reconnect(self) -> None:
        # The library would wait until the server has read its buffer: a frozen server never does.
        self.abort()
        await super()._attempt_reconnect()

    def abort(self) -> None:
        """Abort the connection to the server; unsent data is lost."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is None:
            return
        transport = writer.transport
        if not transport.is_closing() or transport.get_write_buffer_size():  # a closed one cannot be aborted
            transport.abort()

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        try:
            return await heeding(super()._flush_pending(force_flush))  # the library would end on a cancellation
        except RuntimeError:
            # uvloop raises it for a lost connection before the library has noticed: the pending data is sent later.
            if not self._is_lost():
                raise
            done = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done

    def _is_lost(self) -> bool:
        writer = getattr(self._transport, "_io_writer", None)
        return writer is None or writer.is_closing()

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        # The library writes a ping ahead of the pending data, so its answer would not cover that data.
        self._loop = self._loop or asyncio.get_running_loop()
        self._pongs.append(future or self._loop.create_future())
        self._pending.append(_PING)
        self._pending_data_size += len(_PING)
        self._flush_soon()  # also if the server reads nothing: pings detect that

    async def _process_pong(self) -> None:
        # The waiter may have been cancelled; the library would then lose the connection.
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def listen(self, subject: str, arrival: Arrival) -> Subscription:
        """Subscribe a function that the parser calls for every message. End it with `unlisten`."""
        # A subscription with a future gets neither queue nor task; `_process_msg` below never touches the future.
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        subscription = await self.subscribe(subject, future=future)
        self._arrivals[subscription._id] = arrival
        return subscription

    async def listen_to_deliveries(self, subject: str, delivery: Delivery) -> Subscription:
        """Like `listen`, for a function that needs reply subjects too, such as those of a JetStream consumer."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        subscription = await self.subscribe(subject, future=future)
        self._deliveries[subscription._id] = delivery
        return subscription

    async def unlisten(self, subscription: Subscription) -> None:
        """End a subscription made by `listen`."""
        self._arrivals.pop(subscription._id, None)
        self._deliveries.pop(subscription._id, None)
        if not self.is_closed:
            await subscription.unsubscribe()

    async def leave(self, subscription: Subscription, seconds: float) -> None:
        """End a subscription after the messages already sent by the server are handled, at most ``seconds`` later.

        The library either drops messages in transit, or waits for the server without a bound.
        """
        try:
            async with asyncio.timeout(seconds):
                if self.is_connected:
                    await self._send_unsubscribe(subscription._id)
                    await self.flush()
                await subscription._pending_queue.join()
        except (TimeoutError, OSError, nats.errors.Error):
            pass  # the server is away, and has dropped the subscription with the connection
        finally:
            self._arrivals.pop(subscription._id, None)
            self._deliveries.pop(subscription._id, None)
            subscription._closed = True
            subscription._stop_processing()
            self._remove_sub(subscription._id)

    def send(self, subject: str, reply: str, data: bytes) -> None:
        """Publish on a valid subject, with the next flush; only while connected, and below the server's payload limit.

        Raises:
            BufferError: the outgoing buffer is full.
        """
        if self._pending_data_size > self._max_pending_size:
            raise BufferError(f"{self._pending_data_size} bytes wait to be sent")
        command = b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply.encode(), len(data), data)
        self._pending.append(command)
        self._pending_data_size += len(command)
        if self._flush_due:
            return
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        wait = self._flushed_at + FLUSH_SECONDS - loop.time()
        if wait <= 0:
            self._flush_soon()
        else:
            self._flush_due = True
            loop.call_later(wait, self._flush_soon)

    def _flush_soon(self) -> None:
        self._flush_due = False
        queue, loop = self._flush_queue, self._loop
        if queue is not None and loop is not None:
            self._flushed_at = loop.time()
            if queue.empty():
                queue.put_nowait(loop.create_future())

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        arrival = self._arrivals.get(sid)
        if arrival is None:
            if (delivery := self._deliveries.get(sid)) is not None:
                delivery(subject, reply, data, headers)
                return
            await super()._process_msg(sid, subject, reply, data, headers)  # type: ignore[arg-type]  # None without any
            return
        arrival(subject.decode(), data, headers or b"")


async def heeding(work: Awaitable[T]) -> T:
    """Await ``work``, and re-raise a cancellation that it swallowed.

    Before Python 3.12 `asyncio.wait_for` loses a cancellation that arrives after its completion.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        return await work
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError
