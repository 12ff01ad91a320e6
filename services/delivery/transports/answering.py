"""Answers of raw ASGI handlers: a stream that a feed writes to, and a whole one."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from litestar.types import ASGIApp

from services.delivery.core.formats import Format
from services.delivery.core.gzip import GZIPPED, Block, Wrapping, whole_gzip
from services.delivery.streams import Stream, Streams
from services.delivery.subscriber import Subscriber
from services.kit.problem import Problem, problem_bytes

__all__ = ["NOTHING_FOLLOWS", "RAW_SEND", "STREAM_HEADERS", "send_whole", "streaming", "watching", "whole"]

RAW_SEND: Final = "tailrace.send"
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


async def send_problem(send: Any, problem: Problem) -> None:
    """Send a problem that turned up when the answer had been left to a raw handler already."""
    headers = problem.headers.items()
    await send_whole(send, problem.status, problem_bytes(problem), "application/problem+json", headers)


NOTHING_FOLLOWS: Final = whole(204, b"", "")


def streaming(streams: Streams, stream: Stream, format_: Format, media_type: bytes, *, gzip: bool = False) -> ASGIApp:
    """Return the answer that shows a stream over HTTP; 204 when nothing follows.

    ``gzip``: it goes out compressed, and ``format_`` is a `Gzipped` one.
    """
    if stream.seq is None:
        return NOTHING_FOLLOWS

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", media_type), *STREAM_HEADERS, *([GZIPPED] if gzip else [])]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        raw = scope.get(RAW_SEND, send)
        with watching(receive) as joined:
            await streams.serve(stream, _wrapped(raw) if gzip else raw, format_, joined)

    return answer


def _wrapped(send: Any) -> Any:
    wrapping = Wrapping()

    async def wrapped(block: Block) -> None:
        await send(wrapping.body(block))

    return wrapped


@contextmanager
def watching(receive: Any) -> Iterator[Callable[[Subscriber], None]]:
    """Give what ends a subscriber when its client leaves; to be called when it has joined."""
    watches: list[asyncio.Task[None]] = []

    def joined(subscriber: Subscriber) -> None:
        watches.append(asyncio.create_task(_watch(receive, subscriber)))

    try:
        yield joined
    finally:
        for watch in watches:
            watch.cancel()


async def _watch(receive: Any, subscriber: Subscriber) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            subscriber.finish("disconnected")
            return
