"""Buffer the messages of one gRPC call: small, joined into one message, written by one task."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

__all__ = ["CallOutbox"]

BOUND: Final = 65_536


class CallOutbox:
    """Accept serialized messages that may be joined, and write them while its block runs.

    At most `BOUND` bytes wait in addition to the current write, or one larger message. gRPC accepts a message when the
    flow control of HTTP/2 allows it, so a client that does not read makes `put` wait. ``writing_since``: begin of the
    current write in monotonic seconds.
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
        """Queue a message; wait while the outbox is full.

        Raises:
            ConnectionError: the call has ended.
        """
        while self._size and self._size + len(data) > BOUND and not self._closed:
            await self._change()
        if self._closed:
            raise ConnectionResetError("the call is over")
        self._parts.append(data)
        self._size += len(data)
        self._changed.set()

    async def flush(self, seconds: float) -> bool:
        """Wait at most ``seconds`` for all writes; return whether everything was written."""
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
        except Exception:  # when the client is gone, gRPC raises its own errors, usage errors or internal ones
            self._closed = True
        finally:
            self._free.set()
