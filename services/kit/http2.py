"""HTTP/2: granian on a private Unix socket of this process, and a proxy that forwards connections to it."""

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, cast

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP2Settings
from granian.server.embed import Server

from services.kit.problem import send_problem
from services.kit.request_head import wrong_host

__all__ = ["Http2Server", "serving_http2"]

STREAMS_OF_A_CONNECTION: Final = 1_024
HEADER_BYTES: Final = 65_536
STARTUP_SECONDS: Final = 10.0
LAST_SECONDS: Final = 0.5


class Http2Server:
    """Forward connections to the server behind ``path``."""

    def __init__(self, path: Path, server: Server, task: asyncio.Task[None]) -> None:
        self._path = str(path)
        self._server = server
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._ends: set[_ProxyEnd] = set()  # both ends of each connection; bounded by the process's open files
        self._joining: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def take(self, transport: asyncio.Transport, data: bytes) -> None:
        """Forward a connection; ``data`` has already been read from it."""
        transport.pause_reading()
        end = _ProxyEnd(self._ends)
        transport.set_protocol(end)
        end.connection_made(transport)
        task = self._loop.create_task(self._forward(end, data))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    async def _forward(self, client: "_ProxyEnd", data: bytes) -> None:
        try:
            await self._loop.create_unix_connection(lambda: _UpstreamEnd(self._ends, client, data), self._path)
        except OSError:
            client.transport.abort()

    async def close(self, seconds: float) -> None:
        """Accept no more, notify clients, wait up to ``seconds`` for open responses; then close the rest."""
        if self._is_closed:
            return
        self._is_closed = True
        self._server.stop()  # type: ignore[no-untyped-call]  # granian ships no annotation for it
        await asyncio.wait({self._task}, timeout=seconds)
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=LAST_SECONDS)  # it may ignore stop and cancellation; continue anyway
        for end in tuple(self._ends):
            end.transport.abort()


class _ProxyEnd(asyncio.Protocol):
    """One end of a forwarded connection: the data it reads is written to the other end."""

    def __init__(self, ends: set["_ProxyEnd"]) -> None:
        self._ends = ends
        self.other: _ProxyEnd | None = None
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)  # until it is connected
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._ends.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self._ends.discard(self)
        if (other := self._peer()) is not None:
            other.transport.close()

    def data_received(self, data: bytes) -> None:
        if (other := self._peer()) is not None:
            other.transport.write(data)

    def pause_writing(self) -> None:
        if (other := self._peer()) is not None:
            other.transport.pause_reading()

    def resume_writing(self) -> None:
        if (other := self._peer()) is not None:
            other.transport.resume_reading()

    def _peer(self) -> "_ProxyEnd | None":
        """Return the other end if it is open."""
        return None if self.other is None or self.other.is_lost else self.other


class _UpstreamEnd(_ProxyEnd):
    """The end at the server, which may send first: it is joined when it is connected."""

    def __init__(self, ends: set[_ProxyEnd], client: _ProxyEnd, data: bytes) -> None:
        super().__init__(ends)
        self.other = client
        self._data = data

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        client = self._peer()
        if client is None:
            self.transport.close()
            return
        client.other = self
        self.transport.write(self._data)
        client.transport.resume_reading()


@asynccontextmanager
async def serving_http2(app: Any, limit: int, *, grace: Callable[[], float], scheme: str) -> AsyncIterator[Http2Server]:
    """Serve ``app`` (ASGI) while the block runs; ``limit``: concurrent requests; ``scheme``: the clients' scheme.

    A connection has at most `STREAMS_OF_A_CONNECTION` streams, a request headers of `HEADER_BYTES`. At the end of the
    block, open responses may take ``grace`` seconds more.
    """

    def led(scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        scope["scheme"] = scheme
        if scope["type"] == "http" and (refusal := wrong_host(scope["headers"], scope["http_version"])) is not None:
            return send_problem(send, refusal)
        answer: Awaitable[None] = app(scope, receive, send)
        return answer

    logging.getLogger("_granian").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="tailrace-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "http2"  # in a folder that only this user may enter
        server = Server(
            led,
            uds=path,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http2,
            backpressure=limit,
            log_enabled=False,
            http2_settings=HTTP2Settings(max_concurrent_streams=STREAMS_OF_A_CONNECTION, max_headers_size=HEADER_BYTES),
        )
        task = asyncio.create_task(server.serve(), name="http2")
        http2 = Http2Server(path, server, task)
        try:
            await _wait_until_listening(path, task)
            yield http2
        finally:
            await http2.close(grace())


async def _wait_until_listening(path: Path, task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(STARTUP_SECONDS):
        while True:
            if task.done():
                task.result()
                raise RuntimeError("the HTTP/2 server ended while it started")
            try:
                _reader, writer = await asyncio.open_unix_connection(path)
            except OSError:
                await asyncio.sleep(0.01)
                continue
            writer.close()
            return
