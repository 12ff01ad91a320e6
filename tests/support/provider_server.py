"""A small real HTTP server that answers every POST like a provider, in chunks that the test defines."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from aiohttp import web

__all__ = ["Asked", "Provider", "Replay", "providing", "unlistening_port"]

End = Literal["close", "reset", "hang"]


@dataclass
class Replay:
    """One response. ``chunks`` are written one by one; between them the server waits for ``gate``, if there is one.

    ``end``: ``close`` finishes the response properly, ``reset`` breaks the connection, ``hang`` leaves it open and
    silent. ``headers_after``: headers are held back until this event.
    """

    chunks: Iterable[bytes] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "text/event-stream"})
    end: End = "close"
    gate: Callable[[], Any] | None = None
    headers_after: asyncio.Event | None = None

    @classmethod
    def of(cls, wire: bytes, size: int = 4096, **settings: Any) -> "Replay":
        """Return a replay of ``wire`` in chunks of ``size`` bytes."""
        return cls([wire[at : at + size] for at in range(0, len(wire), size)], **settings)


@dataclass
class Asked:
    """A request that arrived."""

    path: str
    headers: dict[str, str]
    body: Any


class Provider:
    """The running server. ``replay`` may be replaced at any time; ``asked`` lists requests, newest last.

    ``turns`` are answered first, one to each request.
    ``active`` counts answers under way; ``abandoned`` those whose client went away before their end.
    """

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.turns: list[Replay] = []
        self.asked: list[Asked] = []
        self.active = 0
        self.abandoned = 0
        self.url = ""
        self._closing = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Replay to one request."""
        raw = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.asked.append(Asked(request.path, headers, msgspec.json.decode(raw) if raw else None))
        self.active += 1
        try:
            return await self._play(request, self.turns.pop(0) if self.turns else self.replay)
        except (ConnectionError, asyncio.CancelledError):
            self.abandoned += 1
            raise
        finally:
            self.active -= 1

    async def _play(self, request: web.Request, replay: Replay) -> web.StreamResponse:
        if replay.headers_after is not None:
            await self._or_closing(replay.headers_after.wait())
        response = web.StreamResponse(status=replay.status, headers=replay.headers)
        await response.prepare(request)
        for chunk in replay.chunks:
            await response.write(chunk)
            # one chunk, one segment, as far as that can be had: let it leave before the next is written
            await asyncio.sleep(0)
            if replay.gate is not None:
                await self._or_closing(replay.gate())
        if replay.end == "reset":
            reset(request)
        elif replay.end == "hang":
            await self._or_closing(asyncio.Event().wait())
        else:
            await response.write_eof()
        return response

    async def _or_closing(self, waiting: Any) -> None:
        tasks = [asyncio.ensure_future(waiting), asyncio.ensure_future(self._closing.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        """Release every hanging response."""
        self._closing.set()


def reset(request: web.Request) -> None:
    """Break the connection with a TCP reset."""
    assert request.transport is not None
    request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()


@asynccontextmanager
async def providing(replay: Replay | None = None) -> AsyncIterator[Provider]:
    """Run a provider on a free loopback port while the context is open."""
    provider = Provider(replay or Replay())
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_post("/{path:.*}", provider.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]  # asyncio's own server has it
        provider.url = f"http://127.0.0.1:{port}"
        yield provider
    finally:
        provider.close()
        await runner.cleanup()


@asynccontextmanager
async def unlistening_port() -> AsyncIterator[int]:
    """Reserve a loopback port without a listener, so that connections are refused."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])
