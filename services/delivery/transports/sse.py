"""Server-sent events: a raw ASGI answer, written to by the feed and not by a task per event."""

import asyncio
from typing import Any, Final
from urllib.parse import parse_qs

from litestar.types import ASGIApp

from services.delivery.core.sse import HEADERS, SSE
from services.delivery.streams import Stream, Streams, Wish
from services.delivery.subscriber import Subscriber
from services.kit.auth.principal import principal_of
from services.kit.problem import Problem

__all__ = ["RAW_SEND", "SessionEvents", "wish_of"]

RAW_SEND: Final = "tailrace.send"
_PARAMETERS: Final = frozenset({"after", "from", "generation"})
_OVER: Final = {"type": "http.response.start", "status": 204, "headers": [(b"cache-control", b"no-store")]}


def wish_of(scope: dict[str, Any]) -> Wish:
    """Return what a request for a session's events asks for.

    Raises:
        Problem: 400, a part of it is not valid.
    """
    headers = dict(scope["headers"])
    try:
        query = parse_qs(scope["query_string"].decode("ascii"), keep_blank_values=True, max_num_fields=20)
        single = {name: _single(query, name) for name in _PARAMETERS}
    except ValueError as error:
        raise Problem(400, str(error)) from error
    unknown = sorted(set(query) - _PARAMETERS)
    if unknown:
        raise Problem(400, f"unknown query parameter {unknown[0][:40]!r}: use after, from, generation")
    return Wish.read(
        scope["path_params"]["session"],
        generation=single["generation"],
        after=single["after"],
        last_event_id=headers.get(b"last-event-id", b"").decode("latin-1") or None,
        from_=single["from"],
    )


def _single(query: dict[str, list[str]], name: str) -> str | None:
    values = query.get(name)
    if values is None:
        return None
    if len(values) > 1:
        raise ValueError(f"query parameter {name!r} stands more than once")
    return values[0]


class SessionEvents:
    """``GET /v1/sessions/{session}/events``."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def open(self, scope: Any) -> ASGIApp:
        """Check one request and return the answer to it, which streams.

        Raises:
            Problem: the wish cannot be met.
        """
        stream = await self._streams.open(principal_of(scope), wish_of(scope))

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            if stream.seq is None:
                await send(_OVER)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
            await self._serve(stream, receive, scope.get(RAW_SEND, send))

        return answer

    async def _serve(self, stream: Stream, receive: Any, send: Any) -> None:
        watches: list[asyncio.Task[None]] = []

        def joined(subscriber: Subscriber) -> None:
            watches.append(asyncio.create_task(_watch(receive, subscriber)))

        try:
            await self._streams.serve(stream, send, SSE, joined)
        finally:
            for watch in watches:
                watch.cancel()


async def _watch(receive: Any, subscriber: Subscriber) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            subscriber.finish("disconnected")
            return
