"""A client of server-sent events that can drop its connection and resume with its last id, as a browser does."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, SSEError, aconnect_sse

__all__ = ["SseClient", "SseReader", "small_buffers"]

# What a reader may meet when a server dies or a connection is cut, besides the end of the response.
# A silence that lasts too long is none of it.
_BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.StreamError)


def small_buffers() -> httpx.AsyncClient:
    """Return an HTTP client with small socket buffers, so that a paused reader soon blocks the server's writes."""
    import socket

    options = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 262_144)]
    return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(socket_options=options), timeout=20)


class SseReader:
    """One open connection. ``status`` is the answer's; with anything but 200 there is nothing to read."""

    def __init__(self, client: "SseClient", response: httpx.Response, frames: AsyncIterator[ServerSentEvent]) -> None:
        self.status = response.status_code
        self.response = response
        self._client = client
        self._frames = frames

    async def until(self, enough: Callable[["SseClient"], bool]) -> bool:
        """Read until ``enough`` holds (True), or the response ends or breaks (False)."""
        if self.status != 200:
            return False
        while not enough(self._client):
            try:
                frame = await anext(self._frames)
            except (StopAsyncIteration, *_BROKEN):
                return False
            self._client.take(frame)
        return True

    async def count(self, events: int) -> bool:
        """Read until the client has so many events in all."""
        return await self.until(lambda client: len(client.events) >= events)

    async def to_the_end(self) -> None:
        """Read until the response ends."""
        await self.until(lambda _: False)


class SseClient:
    """Reads one URL over any number of connections.

    ``events``: events without a name, decoded; ``ids``: the id of each; ``controls``: name and data of named events.
    """

    def __init__(self, http: httpx.AsyncClient, url: str, **query: str) -> None:
        self.http = http
        self.url = url
        self.query = query
        self.last_id = ""
        self.events: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.controls: list[tuple[str, Any]] = []
        self.retry: int | None = None

    @contextlib.asynccontextmanager
    async def connected(self, **headers: str) -> AsyncIterator[SseReader]:
        """Connect, with the last id if there is one. Leaving the block drops the connection at once."""
        if self.last_id:
            headers.setdefault("Last-Event-ID", self.last_id)
        async with aconnect_sse(self.http, "GET", self.url, params=self.query, headers=headers) as source:
            try:
                yield SseReader(self, source.response, source.aiter_sse())
            except SSEError as error:
                raise AssertionError(f"not an event stream: {source.response.headers}") from error

    async def follow(self, enough: Callable[["SseClient"], bool]) -> None:
        """Read until ``enough`` holds; connect again whenever the response ends or the server is away."""
        import asyncio

        while not enough(self):
            try:
                async with self.connected() as reader:
                    if reader.status == 204:
                        return
                    assert reader.status in (200, 502, 503), reader.status
                    if await reader.until(enough):
                        return
            except _BROKEN:
                pass
            await asyncio.sleep(0.02)

    async def read_all(self, **headers: str) -> int:
        """Read one response to its end and return its status."""
        async with self.connected(**headers) as reader:
            await reader.to_the_end()
            return reader.status

    def take(self, frame: ServerSentEvent) -> None:
        """Record the content of one frame."""
        if frame.retry is not None:
            self.retry = frame.retry
        if not frame.data:
            return
        if frame.event != "message":
            self.controls.append((frame.event, json.loads(frame.data)))
            return
        self.last_id = frame.id
        self.ids.append(frame.id)
        self.events.append(json.loads(frame.data))
