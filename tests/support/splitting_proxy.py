"""A proxy that forwards a server's bytes in pieces of a few bytes and can drop all connections."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

__all__ = ["SplittingProxy", "splitting"]


class SplittingProxy:
    """A running proxy. ``url``: its address. ``most``: maximum bytes of one piece."""

    def __init__(self, port: int, seed: int, most: int) -> None:
        self.url = ""
        self._port = port
        self._rng = random.Random(seed)
        self._most = most
        self._open: set[asyncio.StreamWriter] = set()
        self.away = False  # whether it lets nobody through

    def drop(self) -> None:
        """Break every connection, as a lost network does."""
        for writer in list(self._open):
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.away:
            writer.transport.abort()
            return
        with suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            self._open |= {writer, back}
            try:
                await asyncio.gather(self._copy(reader, back, 65_536), self._copy(there, writer, self._most))
            finally:
                self._open -= {writer, back}
                writer.close()
                back.close()

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, most: int) -> None:
        with suppress(OSError):
            while data := await source.read(65_536):
                while data:
                    size = self._rng.randint(1, most)
                    target.write(data[:size])
                    await target.drain()
                    data = data[size:]
                    await asyncio.sleep(0)  # so that the pieces leave one by one
            target.write_eof()


@asynccontextmanager
async def splitting(port: int, *, seed: int = 1, most: int = 3) -> AsyncIterator[SplittingProxy]:
    """Run a proxy in front of a local port while the block runs."""
    proxy = SplittingProxy(port, seed, most)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.drop()
