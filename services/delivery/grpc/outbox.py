"""What waits to be written to one gRPC call: little, joined into one message, written by one task."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

__all__ = ["CallOutbox"]

BOUND: Final = 65_536


class CallOutbox:
    """Takes finished messages that may be joined, and writes them while its block runs.

    At most `BOUND` bytes wait beside what is being written, or one message that is larger. gRPC takes a message when
    the flow control of HTTP/2 lets it go, so a client that does not read makes `put` wait. ``writing_since``: when what
    is being written was begun, in monotonic seconds.
    """

    def __init__(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        self._write = write
        self._parts: list[bytes] = []  # bounded by BOUND
        self._size = 0
        self._loop = asyncio.get_running_loop()
        self.writing_since: float | None = None
        self._closed = False
        self._changed = asyncio.Event()
        self._free = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "CallOutbox":
        self._writer = asyncio.create_task(self._run(), name="grpc-outbox")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        self._free.set()
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)

    async def put(self, data: bytes) -> None:
        """Take a message; wait while there is no room for it.

        Raises:
            ConnectionError: the call is over.
        """
        while self._size and self._size + len(data) > BOUND and not self._closed:
            await self._change()
        if self._closed:
            raise ConnectionResetError("the call is over")
        self._parts.append(data)
        self._size += len(data)
        self._changed.set()

    async def flush(self, seconds: float) -> bool:
        """Wait until all is written, at most so long; tell whether it is."""
        try:
            async with asyncio.timeout(seconds):
                while (self._size or self.writing_since is not None) and not self._closed:
                    await self._change()
        except TimeoutError:
            return False
        return not self._size

    async def _change(self) -> None:
        self._free.clear()
        await self._free.wait()

    async def _run(self) -> None:
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                while self._parts:
                    data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                    self._parts, self._size, self.writing_since = [], 0, self._loop.time()
                    self._free.set()
                    await self._write(data)
                    self.writing_since = None
                self._free.set()
        except Exception:  # whatever gRPC raises when the client is gone: its own errors, usage errors, internal ones
            self._closed = True
        finally:
            self._free.set()
