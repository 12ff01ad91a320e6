"""A provider over HTTP: opens the stream, reads what has arrived, and says in our words what went wrong."""

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import aiohttp
import msgspec

from schemas.usage import Usage
from services.kit.clock import Clock
from services.kit.telemetry import scrub
from services.producer.adapters.http_reading import StreamConnector
from services.producer.core.dialects import Dialect, HttpCall, Parser, UntranslatableCall
from services.producer.core.dialects.openrouter import late_usage
from services.producer.core.parts import Part, UpstreamFailure
from services.producer.core.registry import Provider
from services.producer.ports import Call, UpstreamRefused

__all__ = ["HttpStream", "HttpUpstream", "upstream_session"]

_ERROR_BODY_LIMIT: Final = 64 * 1024
_LOOK_UP_SECONDS: Final = 10.0
_READ_BUFFER: Final = 128 * 1024
# Some servers label their stream carelessly; what can only be something else is refused.
_STREAM_TYPES: Final = ("text/event-stream", "text/plain", "application/octet-stream", "")


def upstream_session(limit: int = 0) -> aiohttp.ClientSession:
    """Return the session that all providers of a process share; ``limit`` connections at most, 0 for no bound.

    Must be called in a running event loop, and closed by the caller.
    """
    connector = StreamConnector(limit=limit, ttl_dns_cache=60, socket_factory=_socket_with_keepalive)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
        read_bufsize=_READ_BUFFER,
    )


def _socket_with_keepalive(address: aiohttp.AddrInfoType) -> socket.socket:
    # A peer that vanished without a word is noticed after about two minutes, even where no deadline runs.
    family, kind, protocol, _, _ = address
    made = socket.socket(family=family, type=kind, proto=protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return made


def _is_stream(response: aiohttp.ClientResponse) -> bool:
    media_type = response.headers.get("content-type", "").partition(";")[0]
    return media_type.strip().lower() in _STREAM_TYPES


class HttpUpstream:
    """One provider. Implements `services.producer.ports.Upstream`."""

    def __init__(self, session: aiohttp.ClientSession, provider: Provider, dialect: Dialect, clock: Clock) -> None:
        self._session = session
        self._provider = provider
        self._dialect = dialect
        self._clock = clock

    @asynccontextmanager
    async def open(self, call: Call) -> AsyncIterator["HttpStream"]:
        """Call the model and enter when the headers of an event stream are there.

        Leaving closes the connection at once, unless the answer was read to its end.

        Raises:
            UpstreamRefused: no stream began; its cause is the library's error, where there was one.
        """
        wire = self._wire(call)
        # ``connect`` covers name resolution, TCP and TLS; waiting for headers is the caller's deadline.
        timeout = aiohttp.ClientTimeout(total=None, connect=call.connect_timeout, sock_connect=call.connect_timeout)
        with self._unreachable(call):
            response = await self._session.post(
                wire.url, data=wire.body, headers=wire.headers, timeout=timeout, allow_redirects=False
            )
        try:
            if response.status != 200 or not _is_stream(response):
                raise UpstreamRefused(await self._refusal(response))
            yield HttpStream(response, self._dialect.parser(response.headers), self.scrubbed)
        finally:
            response.close()

    async def usage_of(self, upstream_id: str) -> Usage | None:
        """Ask OpenRouter what an answer used; ``None`` while it does not say."""
        key = self._provider.key
        headers = {"Authorization": f"Bearer {key.reveal()}"} if key is not None else {}
        timeout = aiohttp.ClientTimeout(total=_LOOK_UP_SECONDS)
        url = self._provider.base_url.rstrip("/") + "/generation"
        try:
            async with self._session.get(
                url, params={"id": upstream_id}, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                return late_usage(await response.content.read(_ERROR_BODY_LIMIT)) if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    def scrubbed(self, failure: UpstreamFailure) -> UpstreamFailure:
        """Return ``failure`` without anything secret in its message: providers like to quote the key they were sent."""
        message = scrub(failure.message)
        secrets = [*self._provider.headers.values()]
        if self._provider.key is not None:
            secrets.append(self._provider.key.reveal())
        for secret in secrets:
            if len(secret) >= 6:
                message = message.replace(secret, "***")
        return msgspec.structs.replace(failure, message=message)

    def _wire(self, call: Call) -> HttpCall:
        key = self._provider.key.reveal() if self._provider.key is not None else None
        try:
            return self._dialect.request(call, self._provider.base_url, key, self._provider.headers)
        except UntranslatableCall as error:
            failure = UpstreamFailure(code="upstream_bad_request", message=str(error))
            raise UpstreamRefused(self.scrubbed(failure)) from error

    async def _refusal(self, response: aiohttp.ClientResponse) -> UpstreamFailure:
        body = b""
        try:
            while len(body) < _ERROR_BODY_LIMIT:
                chunk = await response.content.read(_ERROR_BODY_LIMIT - len(body))
                if not chunk:
                    break
                body += chunk
        except (aiohttp.ClientError, OSError):
            pass  # the status says enough when the body breaks off
        failure = self._dialect.refusal(response.status, response.headers, body, self._clock.wall())
        return self.scrubbed(failure)

    @contextmanager
    def _unreachable(self, call: Call) -> Iterator[None]:
        """Map the library's errors before any answer; all of them are worth another try."""
        try:
            yield
        except TimeoutError as error:
            raise self._refused(f"no connection within {call.connect_timeout:g} s", connected=False) from error
        except aiohttp.ClientConnectorError as error:  # refused, no such name, no TLS
            raise self._refused(str(error), connected=False) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._refused(f"{error or type(error).__name__}", connected=True) from error

    def _refused(self, what: str, *, connected: bool) -> UpstreamRefused:
        message = f"{self._provider.name} cannot be reached: {what}"
        failure = UpstreamFailure(code="upstream_unreachable", message=message, recoverable=True)
        return UpstreamRefused(self.scrubbed(failure), connected=connected)


class HttpStream:
    """An answer while it arrives. Implements `services.producer.ports.UpstreamStream`."""

    def __init__(
        self, response: aiohttp.ClientResponse, parser: Parser, scrubbed: Callable[[UpstreamFailure], UpstreamFailure]
    ) -> None:
        self._response = response
        self._parser = parser
        self._scrubbed = scrubbed
        self._broken = False

    async def read(self) -> list[Part] | None:
        """Return what the next socket read held; ``None`` at the end of the stream."""
        if self._broken:
            return None
        try:
            data = await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            self._broken = True
            message = f"the connection broke: {error or type(error).__name__}"
            return [self._scrubbed(UpstreamFailure(code="upstream_cut_off", message=message, recoverable=True))]
        if not data:
            return None
        parts = self._parser.feed(data)
        # a failure is always the last part, so that looking there is enough
        if parts and isinstance(parts[-1], UpstreamFailure):
            parts[-1] = self._scrubbed(parts[-1])
        return parts
