"""Buffer the messages of one WebSocket, written in order by one task."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

__all__ = ["SocketOutbox"]

BOUND: Final = 65_536
Messages = Sequence[dict[str, Any]]


def _size(messages: Messages) -> int:
    return sum(len(message.get("text") or message.get("bytes") or b"") for message in messages)


class SocketOutbox:
    """Accept ASGI messages of several subscriptions, and write them in order while its block runs.

    At most `BOUND` bytes wait, or one larger write; further senders wait for their turn, which is the backpressure of
    a client that does not read. The server's ``send`` is never called concurrently.
    """

    def __init__(self, send: Callable[[Any], Awaitable[None]]) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._queue: deque[dict[str, Any]] = deque()  # bounded by BOUND
        self._size = 0
        self._turns: deque[asyncio.Future[None]] = deque()  # one for each subscription and operation at most
        self._taken = self._written = 0  # messages
        self._marks: deque[tuple[int, asyncio.Future[bool]]] = deque()  # one for each consumer read at most
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self._writer: asyncio.Task[None] | None = None
        self.blocked_at: float | None = None

    async def __aenter__(self) -> "SocketOutbox":
        self._writer = asyncio.create_task(self._run(), name="websocket-outlet")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        self._close()

    async def send(self, messages: Messages) -> None:
        """Queue messages; wait while the outbox is full.

        Raises:
            ConnectionError: the socket is closed.
        """
        if not self._closed and (self._turns or self._size >= BOUND):
            await self._turn()
        try:
            if self._closed:
                raise ConnectionResetError("the socket is closed")
            self._put(messages)
        finally:
            self._next_turn()

    async def write(self, messages: Messages) -> None:
        """Queue messages and wait until they are written.

        Raises:
            ConnectionError: the socket is closed.
        """
        await self.send(messages)
        done: asyncio.Future[bool] = self._loop.create_future()
        self._marks.append((self._taken, done))
        if not await done:
            raise ConnectionResetError("the socket is closed")

    def offer(self, messages: Messages) -> bool:
        """Queue messages unless the outbox is full or closed; return whether they were queued."""
        if self._closed or self._turns or self._size >= BOUND:
            return False
        self._put(messages)
        return True

    async def flush(self, seconds: float) -> bool:
        """Wait at most ``seconds`` for all writes; return whether everything was written."""
        try:
            async with asyncio.timeout(seconds):
                while (self._queue or self._turns) and not self._closed:
                    await self._idle.wait()
                    await asyncio.sleep(0)
                await self._idle.wait()
        except TimeoutError:
            return False
        return not self._closed

    def _put(self, messages: Messages) -> None:
        self._queue.extend(messages)
        self._taken += len(messages)
        self._size += _size(messages)
        self._idle.clear()
        self._wake.set()

    async def _turn(self) -> None:
        turn: asyncio.Future[None] = self._loop.create_future()
        self._turns.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            self._turns.remove(turn)
            self._next_turn()
            raise
        self._turns.popleft()

    def _next_turn(self) -> None:
        if self._turns and (self._size < BOUND or self._closed) and not self._turns[0].done():
            self._turns[0].set_result(None)

    def _close(self) -> None:
        self._closed = True
        self._queue.clear()
        self._idle.set()
        self._pass_marks(written=False)
        self._next_turn()

    def _pass_marks(self, *, written: bool) -> None:
        while self._marks and (not written or self._marks[0][0] <= self._written):
            _, done = self._marks.popleft()
            if not done.done():
                done.set_result(written)

    async def _run(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._queue:
                    message = self._queue.popleft()
                    self.blocked_at = self._loop.time()
                    await self._send(message)
                    self.blocked_at = None
                    self._size -= _size((message,))
                    self._written += 1
                    self._pass_marks(written=True)
                    self._next_turn()
                self._idle.set()
        except (OSError, RuntimeError):  # the client is gone
            self._close()
