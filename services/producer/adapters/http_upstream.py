"""Call a provider over HTTP: open a stream, read the arrived parts, and map failures to `UpstreamFailure`."""

import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import aiohttp
import msgspec

from schemas.usage import Usage
from services.kit.clock import Clock
from services.kit.telemetry import scrub
from services.producer.adapters.http_reading import StreamConnector
from services.producer.core.dialects import Dialect, HttpCall, Parser, UntranslatableCall
from services.producer.core.dialects.failures import retry_after
from services.producer.core.dialects.openrouter import late_usage
from services.producer.core.parts import End, NoticePart, Part, UpstreamFailure
from services.producer.core.registry import Provider
from services.producer.ports import UpstreamRefused, UpstreamRequest

__all__ = ["HttpStream", "HttpUpstream", "upstream_session"]

_ERROR_BODY_LIMIT: Final = 64 * 1024
_LOOK_UP_SECONDS: Final = 10.0
_SHORTEST_SECRET: Final = 6
_READ_BUFFER: Final = 128 * 1024
# Media types of answers. With any other type the first bytes decide whether the body is one.
_ANSWER_TYPES: Final = (
    "text/event-stream",
    "application/json",
    "application/x-ndjson",
    "application/octet-stream",
    "text/plain",
    "",
)
_ANSWER_BEGINS: Final = (b"data:", b"event:", b"id:", b"retry:", b":", b"{", b"[")
_LONGEST_BEGIN: Final = max(map(len, _ANSWER_BEGINS))
_IGNORED: Final = b"\xef\xbb\xbf \t\r\n"
_RARE: Final = (UpstreamFailure, NoticePart, End)


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
    # TCP keep-alive detects a silently lost peer after about two minutes, even without a deadline.
    family, kind, protocol, _, _ = address
    made = socket.socket(family=family, type=kind, proto=protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return made


def _without_cut(secret: str, message: str) -> str:
    """Mask the beginning of a secret before the "…" of a truncated message."""
    cut = message.find("…")
    for length in range(min(len(secret) - 1, cut), _SHORTEST_SECRET - 1, -1):
        if message.endswith(secret[:length], 0, cut):
            return f"{message[: cut - length]}***{message[cut:]}"
    return message


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    """Read the first bytes of a body if its media type is not that of an answer; otherwise return none."""
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type in _ANSWER_TYPES or media_type.endswith("+json"):
        return b""
    begun = b""
    with contextlib.suppress(aiohttp.ClientError, OSError):  # then the received bytes decide
        while len(begun) < _ERROR_BODY_LIMIT and (data := await response.content.readany()):
            begun += data
            if len(begun.lstrip(_IGNORED)) >= _LONGEST_BEGIN:
                break
    return begun or b"<"


class HttpUpstream:
    """One provider. Implements `services.producer.ports.Upstream`."""

    def __init__(self, session: aiohttp.ClientSession, provider: Provider, dialect: Dialect, clock: Clock) -> None:
        self._session = session
        self._provider = provider
        self._dialect = dialect
        self._clock = clock

    @asynccontextmanager
    async def open(self, call: UpstreamRequest) -> AsyncIterator["HttpStream"]:
        """Call the model and enter when the headers of an answer have arrived.

        The body decides, not its media type: an event stream or JSON is an answer under any type.

        Leaving closes the connection at once, unless the answer was read to its end.

        Raises:
            UpstreamRefused: no stream began; its cause is the library's error, if any.
        """
        wire = self._wire(call)
        # ``connect`` covers name resolution, TCP and TLS; waiting for headers is the caller's deadline.
        timeout = aiohttp.ClientTimeout(total=None, connect=call.connect_timeout, sock_connect=call.connect_timeout)
        with self._unreachable(call):
            response = await self._session.post(
                wire.url, data=wire.body, headers=wire.headers, timeout=timeout, allow_redirects=False
            )
        try:
            if not 200 <= response.status < 300:
                raise UpstreamRefused(await self._refusal(response))
            begun = await _beginning(response)
            if begun and not begun.lstrip(_IGNORED).startswith(_ANSWER_BEGINS):
                raise UpstreamRefused(await self._refusal(response, begun))
            yield HttpStream(response, self._dialect.parser(response.headers), self._scrub, begun)
        finally:
            response.close()

    async def usage_of(self, upstream_id: str) -> Usage | None:
        """Query OpenRouter for the usage of an answer; return ``None`` while it has none."""
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
        """Return ``failure`` without secrets in its message: some providers quote the key that they received."""
        return msgspec.structs.replace(failure, message=self._scrubbed_text(failure.message))

    def _scrub(self, part: Part, headers: Mapping[str, str]) -> Part:
        """Return a part without secrets; a failure gets the ``Retry-After`` of the response."""
        if isinstance(part, NoticePart):
            return msgspec.structs.replace(part, message=self._scrubbed_text(part.message))
        if isinstance(part, UpstreamFailure):
            pause = retry_after(headers, self._clock.wall())
            return msgspec.structs.replace(self.scrubbed(part), retry_after=pause)
        return part

    def _scrubbed_text(self, message: str) -> str:
        message = scrub(message)
        secrets = [*self._provider.headers.values()]
        if self._provider.key is not None:
            secrets.append(self._provider.key.reveal())
        for secret in secrets:
            if len(secret) >= _SHORTEST_SECRET:
                message = _without_cut(secret, message.replace(secret, "***"))
        return message

    def _wire(self, call: UpstreamRequest) -> HttpCall:
        key = self._provider.key.reveal() if self._provider.key is not None else None
        try:
            return self._dialect.request(call, self._provider.base_url, key, self._provider.headers)
        except UntranslatableCall as error:
            failure = UpstreamFailure(code="upstream_bad_request", message=str(error))
            raise UpstreamRefused(self.scrubbed(failure)) from error

    async def _refusal(self, response: aiohttp.ClientResponse, begun: bytes = b"") -> UpstreamFailure:
        body = begun
        try:
            while len(body) < _ERROR_BODY_LIMIT:
                chunk = await response.content.read(_ERROR_BODY_LIMIT - len(body))
                if not chunk:
                    break
                body += chunk
        except (aiohttp.ClientError, OSError):
            pass  # the status is enough when the body breaks off
        failure = self._dialect.refusal(response.status, response.headers, body, self._clock.wall())
        return self.scrubbed(failure)

    @contextmanager
    def _unreachable(self, call: UpstreamRequest) -> Iterator[None]:
        """Map the library's errors before an answer; all of them are retryable."""
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
    """A streamed answer. Implements `services.producer.ports.UpstreamStream`."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        parser: Parser,
        scrub: Callable[[Part, Mapping[str, str]], Part],
        first_bytes: bytes = b"",
    ) -> None:
        self._response = response
        self._parser = parser
        self._scrub = scrub
        self._first_bytes = first_bytes
        self._ended = False

    async def read(self) -> list[Part] | None:
        """Read from the socket once and return the parts; ``None`` at the end of the stream."""
        if self._ended:
            return None
        try:
            data, self._first_bytes = self._first_bytes or await self._response.content.readany(), b""
        except (aiohttp.ClientError, OSError) as error:
            self._ended = True
            parts = self._parser.finish(broken=f"{error}" or type(error).__name__)
        else:
            self._ended = not data
            parts = self._parser.feed(data) if data else self._parser.finish()
        # a part with a message is the last one or precedes the ending, so checking the last part is enough
        if parts and isinstance(parts[-1], _RARE):
            parts = [self._scrub(part, self._response.headers) for part in parts]
        return parts if parts or not self._ended else None
