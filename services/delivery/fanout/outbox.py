"""The bounded outgoing queue of one connection, written by one task."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

__all__ = ["BOUND", "Outbox"]

BOUND: Final = 65_536

M = TypeVar("M")


class Outbox(Generic[M]):
    """Queue the messages of several subscriptions, and write them in order while its block runs.

    At most `BOUND` bytes wait, or one call's messages that are larger; further senders take turns, first come, first
    served. So a client that does not read delays only its own subscriptions. ``write`` is never called while an earlier
    call is under way. ``size`` returns the bytes of a message; ``join`` makes one message of all that wait, where the
    protocol lets messages be joined.

    Attributes:
        blocked_at: start of the write that is under way, in monotonic seconds, or None.
    """

    def __init__(
        self,
        write: Callable[[M], Awaitable[None]],
        size: Callable[[M], int],
        join: Callable[[Sequence[M]], M] | None = None,
    ) -> None:
        self._write = write
        self._size_of = size
        self._join = join
        self._loop = asyncio.get_running_loop()
        self._queue: deque[M] = deque()  # bounded by BOUND
        self._size = 0  # of the queue and the write under way
        self._turns: deque[asyncio.Future[None]] = deque()  # one for each subscription and operation at most
        self._taken = self._written = 0  # messages
        self._marks: deque[tuple[int, asyncio.Future[bool]]] = deque()  # one for each call of `write` under way
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self._writer: asyncio.Task[None] | None = None
        self.blocked_at: float | None = None

    async def __aenter__(self) -> "Outbox[M]":
        self._writer = asyncio.create_task(self._run(), name="outbox")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        self._close()

    async def send(self, messages: Sequence[M]) -> None:
        """Queue messages next to each other; wait while the outbox is full.

        Raises:
            ConnectionError: the connection is closed.
        """
        if not self._closed and (self._turns or self._size >= BOUND):
            await self._turn()
        try:
            if self._closed:
                raise ConnectionResetError("the connection is closed")
            self._put(messages)
        finally:
            self._next_turn()

    async def write(self, messages: Sequence[M]) -> None:
        """Queue messages, and wait until they have been written.

        Raises:
            ConnectionError: the connection is closed.
        """
        await self.send(messages)
        done: asyncio.Future[bool] = self._loop.create_future()
        self._marks.append((self._taken, done))
        if not await done:
            raise ConnectionResetError("the connection is closed")

    def offer(self, messages: Sequence[M]) -> bool:
        """Queue messages unless the outbox is full or closed; return whether they were queued."""
        if self._closed or self._turns or self._size >= BOUND:
            return False
        self._put(messages)
        return True

    async def flush(self, seconds: float) -> bool:
        """Wait until all is written, for ``seconds`` at most; return whether it is."""
        try:
            async with asyncio.timeout(seconds):
                while (self._queue or self._turns) and not self._closed:
                    await self._idle.wait()
                    await asyncio.sleep(0)
                await self._idle.wait()
        except TimeoutError:
            return False
        return not self._closed

    def _put(self, messages: Sequence[M]) -> None:
        self._queue.extend(messages)
        self._taken += len(messages)
        self._size += sum(map(self._size_of, messages))
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

    def _next(self) -> tuple[M, int]:
        """Return the next message to write, and how many queued ones it is made of."""
        if self._join is None or len(self._queue) == 1:
            return self._queue.popleft(), 1
        messages = tuple(self._queue)
        self._queue.clear()
        return self._join(messages), len(messages)

    async def _run(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._queue:
                    size = self._size
                    message, count = self._next()
                    if self._join is None:
                        size = self._size_of(message)
                    self.blocked_at = self._loop.time()
                    await self._write(message)
                    self.blocked_at = None
                    self._size -= size
                    self._written += count
                    self._pass_marks(written=True)
                    self._next_turn()
                self._idle.set()
        except Exception:  # a server raises errors of its own kinds when the client is gone
            self._close()
