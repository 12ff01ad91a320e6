"""The connection to NATS: one thin port over nats-py, so that the services do not depend on the client library.

Hot paths use callbacks, never iterators.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Self
from urllib.parse import urlsplit

import nats.errors
import structlog
from nats.aio.msg import Msg as Message
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext
from nats.js import errors as js_errors

from services.kit.jetstream.client import Arrival, Delivery, RelayClient
from services.kit.jetstream.errors import AWAY, APIError, BrokerUnavailable
from services.kit.shutdown import end

__all__ = ["BrokerUnavailable", "Callback", "Connection", "Message", "Responder", "Subscription", "expecting"]

log = structlog.get_logger()

Callback = Callable[[Message], Awaitable[None]]
Responder = Callable[[bytes, str], None]
"""A function of the data of a request and its reply subject. It must return quickly and never raise."""
PENDING_BYTES: Final = 8 * 1024 * 1024
CLOSE_SECONDS: Final = 0.5
"""Seconds for the server to read the last written data; a frozen one reads nothing."""

_PERSISTENT: Final[dict[str, Any]] = {
    "max_reconnect_attempts": -1,
    "reconnect_time_wait": 0.25,  # seconds; fractions work
    "connect_timeout": 2,
    "ping_interval": 2,  # a frozen server is left after about 5 s, well within the lease
    "max_outstanding_pings": 2,
    "pending_size": PENDING_BYTES,
}


def expecting(last: int) -> dict[str, str]:
    """Return headers of an append that is refused unless ``last`` is the subject's last stream sequence (0: none)."""
    return {"Nats-Expected-Last-Subject-Sequence": str(last)}


class Connection:
    """A connection to NATS: publish, subscribe and request.

    ``on_reconnect`` callbacks run after every reconnection, so that readers can read what they missed.
    """

    def __init__(self, client: RelayClient) -> None:
        self.client = client
        self.js: JetStreamContext = client.jetstream(timeout=5.0)
        self.stored_at = 0.0  # event-loop time of the last acknowledgement of `publish_stored` …
        self.unstored_at: float | None = None  # … and of the last missing acknowledgement in spite of a connection
        self._closing = False
        self._reconnected: list[Callable[[], Awaitable[None]]] = []

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, name: str, *, tls: ssl.SSLContext | None = None, wait: float = 30.0
    ) -> AsyncIterator[Self]:
        """Connect (trying for ``wait`` seconds), yield, and close at the end. ``url`` may list servers by commas.

        ``name``: the service; answers arrive below ``_INBOX.<name>``, so that no other service may read them. ``tls``:
        required of every server.

        Raises:
            BrokerUnavailable: no server answered within ``wait`` seconds.
        """
        client = RelayClient()
        self = cls(client)
        servers = [part.strip() for part in url.split(",")]
        first = urlsplit(servers[0])

        async def reconnected() -> None:
            log.info("broker reconnected")
            for callback in self._reconnected:
                await callback()

        async def disconnected() -> None:
            if not self._closing:
                log.warning("broker disconnected")

        reason: Exception | None = None

        async def errored(error: Exception) -> None:
            nonlocal reason
            reason = error
            log.debug("broker error", error=repr(error))

        connecting = asyncio.create_task(
            client.connect(
                servers,
                # Cluster servers announce each other without credentials: the first server's credentials serve for all.
                user=first.username if first.password else None,
                password=first.password,
                name=f"tailrace-{name}",
                inbox_prefix=f"_INBOX.{name}",
                tls=tls,
                **_PERSISTENT,
                reconnected_cb=reconnected,
                disconnected_cb=disconnected,
                error_cb=errored,
            ),
            name="connect",
        )
        try:
            await asyncio.wait({connecting}, timeout=wait)
            if not connecting.done():
                raise TimeoutError(f"no answer in {wait:g} s")
            connecting.result()
        except (TimeoutError, OSError, nats.errors.Error) as error:
            raise BrokerUnavailable(f"no NATS server answers at {_hide(url)}: {reason or error!r}") from error
        finally:
            await end(connecting)  # the library may lose a cancellation, and then retries for ever
        try:
            yield self
        finally:
            self._closing = True
            await _close(client)

    @property
    def is_connected(self) -> bool:
        """Return whether the connection is up."""
        return bool(self.client.is_connected)

    @property
    def reconnects(self) -> int:
        """Return the number of reconnections."""
        return int(self.client.stats["reconnects"])

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Call ``callback`` after every reconnection."""
        self._reconnected.append(callback)

    async def publish(
        self, subject: str, data: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Publish on a core subject; the stream's acknowledgement goes to ``reply``, if given.

        Raises:
            BrokerUnavailable: the outgoing buffer is full or the connection is closed.
        """
        try:
            await self.client.publish(subject, data, reply=reply, headers=headers)
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable(f"cannot publish: {error!r}") from error

    async def publish_stored(
        self, subject: str, data: bytes, *, headers: dict[str, str] | None = None, timeout: float | None = None
    ) -> int:
        """Publish to a stream and wait for the acknowledgement, 5 s without ``timeout``; return the stream sequence.

        Raises:
            BrokerUnavailable: no acknowledgement came.
            APIError: the stream refused it.
        """
        loop, reconnects = asyncio.get_running_loop(), self.reconnects
        try:
            ack = await self.js.publish(subject, data, headers=headers, timeout=timeout)
        except js_errors.APIError as error:
            raise APIError(error.code, error.err_code, error.description) from error
        except (nats.errors.Error, OSError) as error:
            if isinstance(error, TimeoutError) and self.is_connected and self.reconnects == reconnects:
                self.unstored_at = loop.time()
            raise BrokerUnavailable(f"no acknowledgement: {error!r}") from error
        self.stored_at = loop.time()
        return ack.seq

    async def subscribe(
        self, subject: str, callback: Callback, *, queue: str = "", pending_bytes: int = 64 * 1024 * 1024
    ) -> Subscription:
        """Subscribe a callback to a core subject. The broker may not know it yet: see `flush`.

        Each message goes to one subscriber of the same ``queue``.

        Raises:
            BrokerUnavailable: the connection is closed.
        """
        try:
            return await self.client.subscribe(subject, queue=queue, cb=callback, pending_bytes_limit=pending_bytes)
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable(f"cannot subscribe to {subject}: {error!r}") from error

    async def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription at once; on a closed connection it has already ended."""
        with suppress(nats.errors.Error, OSError):
            await subscription.unsubscribe()

    async def listen(self, subject: str, arrival: Arrival) -> Subscription:
        """Subscribe a plain function to a core subject that carries tokens: see `services.kit.jetstream.client`."""
        return await self.client.listen(subject, arrival)

    async def listen_to_deliveries(self, subject: str, delivery: Delivery) -> Subscription:
        """Like `listen`, for a function that needs reply subjects too.

        Raises:
            BrokerUnavailable: the connection is closed.
        """
        try:
            return await self.client.listen_to_deliveries(subject, delivery)
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable(f"cannot subscribe to {subject}: {error!r}") from error

    async def respond(self, subject: str, answer: Responder) -> Subscription:
        """Subscribe a plain function that answers requests; ``answer`` gets their data and reply subject.

        It costs neither a queue nor a task, for the many subjects that rarely get a message. End it with `unlisten`
        or `leave`.

        Raises:
            BrokerUnavailable: the connection is closed.
        """

        def deliver(_subject: bytes, reply: bytes, data: bytes, _headers: bytes | None) -> None:
            answer(bytes(data), bytes(reply).decode())

        return await self.listen_to_deliveries(subject, deliver)

    def answer(self, reply: str, data: bytes) -> None:
        """Answer a request of `respond`; do nothing where it asked for no answer.

        Raises:
            BrokerUnavailable: the outgoing buffer is full.
        """
        if reply:
            self.send(reply, data, "")

    async def unlisten(self, subscription: Subscription) -> None:
        """End a subscription made by `listen` or `listen_to_deliveries`."""
        await self.client.unlisten(subscription)

    async def leave(self, subscription: Subscription, seconds: float) -> None:
        """End a subscription after the messages already sent by the broker are handled, at most ``seconds`` later."""
        await self.client.leave(subscription, seconds)

    def send(self, subject: str, data: bytes, reply: str) -> None:
        """Publish on a valid subject with the next flush, the acknowledgement to ``reply``; only while connected.

        Raises:
            BrokerUnavailable: the outgoing buffer is full.
        """
        try:
            self.client.send(subject, reply, data)
        except BufferError as error:
            raise BrokerUnavailable(f"cannot publish: {error}") from error

    async def flush(self) -> None:
        """Wait until the broker has processed everything sent before, such as a subscription.

        Raises:
            BrokerUnavailable: it did not answer.
        """
        try:
            await self.client.flush(timeout=5)
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable(f"the broker does not answer: {error!r}") from error

    async def request(
        self, subject: str, data: bytes = b"", *, timeout: float = 2.0, headers: dict[str, str] | None = None
    ) -> bytes | None:
        """Send a request and return the answer; ``None`` when ``subject`` has no listener.

        Raises:
            BrokerUnavailable: a listener did not answer in time, or the connection is down.
        """
        try:
            return (await self.client.request(subject, data, timeout=timeout, headers=headers)).data
        except nats.errors.NoRespondersError:
            return None
        except AWAY as error:
            raise BrokerUnavailable(f"no answer on {subject}: {error!r}") from error


async def _close(client: RelayClient) -> None:
    """Close the connection; abort it if the server no longer reads."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            if not client.is_closed:
                await client.close()
    except TimeoutError:
        log.warning("broker did not read the last written data")
    except (nats.errors.Error, OSError, RuntimeError):
        return  # a connection being lost accepts no write
    except asyncio.CancelledError:
        # The library cancels its reconnection, which may wait for the same socket, and so its own waiting too.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
    finally:
        client.abort()


def _hide(url: str) -> str:
    return ",".join(part.rsplit("@", 1)[-1] for part in url.split(","))
