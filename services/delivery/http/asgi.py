"""Build the responses of raw ASGI handlers: event streams and complete bodies."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Final

from litestar.types import ASGIApp

from services.delivery.fanout.streams import Stream, Streams
from services.delivery.fanout.subscriber import Subscriber
from services.delivery.formats.format import Format
from services.delivery.formats.gzip import GZIPPED, Block, Wrapping, whole_gzip
from services.kit.http import RAW_SEND

__all__ = ["NOTHING_FOLLOWS", "STREAM_HEADERS", "detaching_streams", "send_whole", "streaming", "watching", "whole"]

RESTS: Final = "tailrace.rests"
Rest = Callable[[Any, Any], Awaitable[None]]
"""The remainder of a started response; takes the connection's own ``receive`` and ``send``."""
_OF_THE_CONNECTION: Final = frozenset({"type", "method", "http_version"})  # needed to frame the response
_WORTH_WHILE: Final = 1_000  # bytes
STREAM_HEADERS: Final = ((b"cache-control", b"no-store"), (b"x-accel-buffering", b"no"))


def whole(status: int, body: bytes, media_type: str, headers: Iterable[tuple[str, str]] = ()) -> ASGIApp:
    """Return an ASGI application that sends a complete response."""

    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        await send_whole(send, status, body, media_type, headers)

    return answer


async def send_whole(
    send: Any, status: int, body: bytes, media_type: str, headers: Iterable[tuple[str, str]] = (), *, gzip: bool = False
) -> None:
    """Send a complete response; ``gzip``: compress a body of more than 1,000 bytes."""
    own = [(b"cache-control", b"no-store")]
    if gzip and len(body) > _WORTH_WHILE:
        body = whole_gzip(body)
        own.append(GZIPPED)
    if body:
        own += [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode())]
    own += [(name.lower().encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": body, "more_body": False})


NOTHING_FOLLOWS: Final = whole(204, b"", "")


def streaming(
    streams: Streams,
    stream: Stream,
    format_: Format,
    media_type: bytes,
    *,
    gzip: bool = False,
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> ASGIApp:
    """Return the answer that shows a stream over HTTP; 204 when nothing follows.

    ``gzip``: it goes out compressed, and ``format_`` is a `Gzipped` one. ``headers``: sent besides the usual ones.
    """
    if stream.seq is None:
        return NOTHING_FOLLOWS

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        own = [(b"content-type", media_type), *STREAM_HEADERS, *([GZIPPED] if gzip else []), *headers]
        await send({"type": "http.response.start", "status": 200, "headers": own})
        rests: list[Rest] | None = scope.get(RESTS)
        if rests is None:
            await rest(receive, send)
        else:
            rests.append(rest)

    async def rest(receive: Any, send: Any) -> None:
        with watching(receive) as joined:
            await streams.serve(stream, _wrapped(send) if gzip else send, format_, joined)

    return answer


def detaching_streams(app: Any) -> Any:
    """Wrap ``app`` (ASGI) so that a started stream continues outside its call stack.

    A stream lasts for hours; inside ``app``, all request handling state would stay in memory until its end.
    """

    async def outermost(scope: Any, receive: Any, send: Any) -> None:
        scope[RAW_SEND] = send  # streams bypass the wrappers of ordinary responses
        rests: list[Rest] = []
        scope[RESTS] = rests
        await app(scope, receive, send)
        if rests:
            for name in scope.keys() - _OF_THE_CONNECTION:
                del scope[name]
            await rests.pop()(receive, send)

    return outermost


def _wrapped(send: Any) -> Any:
    wrapping = Wrapping()

    async def wrapped(block: Block) -> None:
        await send(wrapping.body(block))

    return wrapped


def watching(receive: Any) -> AbstractContextManager[Callable[[Subscriber], None]]:
    """Return a context manager that yields a function to call with each joined subscriber.

    It stops the subscriber when its client disconnects.
    """
    return _Watching(receive)


class _Watching:
    """Stop the subscribers of one connection when the client disconnects."""

    __slots__ = ("_receive", "_watches")

    def __init__(self, receive: Any) -> None:
        self._receive = receive
        self._watches: list[asyncio.Task[None]] = []

    def __enter__(self) -> Callable[[Subscriber], None]:
        return self._watch

    def __exit__(self, *_: object) -> None:
        for watch in self._watches:
            watch.cancel()

    def _watch(self, subscriber: Subscriber) -> None:
        self._watches.append(asyncio.create_task(_watch(self._receive, subscriber)))


async def _watch(receive: Any, subscriber: Subscriber) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            subscriber.stop("disconnected")
            return
