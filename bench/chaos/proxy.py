"""A byte proxy between one service and one broker node, whose connection can be cut, held or slowed. Loopback only."""

import asyncio
import contextlib
from typing import Final

__all__ = ["Link"]

READ: Final = 65_536


class Link:
    """Listen on ``port`` and forward to ``upstream``, another port.

    Held bytes, at most `READ` of them here and the rest in the kernel, arrive when the link is released, even if their
    sender has gone meanwhile, as in a slow network.
    """

    def __init__(self, port: int, upstream: int) -> None:
        self.port = port
        self.upstream = upstream
        self.latency = 0.0
        self._cut = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        """Start listening."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def close(self) -> None:
        """Close all connections and stop listening."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break all connections and refuse new ones."""
        self._cut = True
        for writer in self._writers:
            writer.transport.abort()

    def hold(self) -> None:
        """Forward nothing in either direction until `heal`."""
        self._flowing.clear()

    def slow(self, seconds: float) -> None:
        """Delay every read by ``seconds``."""
        self.latency = seconds

    def heal(self) -> None:
        """End all faults of the link."""
        self._cut, self.latency = False, 0.0
        self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            if not self._cut:
                await self._join(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # cancelled only by `close`; asyncio's server would report it as an error
        finally:
            writer.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_node, from_node = await asyncio.open_connection("127.0.0.1", self.upstream)
        both = {writer, from_node}
        self._writers |= both
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, from_node))
                group.create_task(self._pump(to_node, writer))
        finally:
            self._writers -= both
            from_node.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # uvloop refuses a write to a transport aborted by `cut`
            while data := await reader.read(READ):
                if self.latency:
                    await asyncio.sleep(self.latency)
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        writer.close()  # the other direction then ends too
