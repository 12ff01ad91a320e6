"""Answers of raw ASGI handlers: a stream that a feed writes to, and a whole one."""

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
"""What is left of an answer that has begun; takes the connection's own ``receive`` and ``send``."""
_OF_THE_CONNECTION: Final = frozenset({"type", "method", "http_version"})  # what the server frames answers by
_WORTH_WHILE: Final = 1_000  # bytes
STREAM_HEADERS: Final = ((b"cache-control", b"no-store"), (b"x-accel-buffering", b"no"))


def whole(status: int, body: bytes, media_type: str, headers: Iterable[tuple[str, str]] = ()) -> ASGIApp:
    """Return an answer that is there already."""

    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        await send_whole(send, status, body, media_type, headers)

    return answer


async def send_whole(
    send: Any, status: int, body: bytes, media_type: str, headers: Iterable[tuple[str, str]] = (), *, gzip: bool = False
) -> None:
    """Send a whole answer; ``gzip``: compressed where that is worth while."""
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
    """Return ``app`` (ASGI), whose streams go on without it, once they have begun.

    A stream lasts for hours, and everything that found out what to send would be kept in memory until its end.
    """

    async def outermost(scope: Any, receive: Any, send: Any) -> None:
        scope[RAW_SEND] = send  # streams write their body past the wrappers that every ordinary answer needs
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
    """Give what ends a subscriber when its client leaves; to be called when it has joined."""
    return _Watching(receive)


class _Watching:
    """Watches over the subscribers of one connection."""

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
