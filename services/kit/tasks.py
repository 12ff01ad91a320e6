"""Concurrent tasks: tracked background tasks, one shared call per key, and waits with a time limit."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

import structlog

from services.kit.shutdown import END_SECONDS, end

__all__ = ["BackgroundTasks", "SingleFlight", "first_of", "together", "wait_for_event"]

log = structlog.get_logger()
K = TypeVar("K")
T = TypeVar("T")
U = TypeVar("U")


class BackgroundTasks:
    """Keep tasks alive until they end, log their failures, and cancel them together.

    It sets no bound: the caller checks ``len()`` before `start` where nothing else bounds the number of tasks.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        return iter(list(self._tasks))

    def start(self, work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Run ``work`` in a task of its own; its failure is logged under ``name``."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def wait(self, seconds: float | None = None) -> None:
        """Wait until the tasks that run now have ended, at most ``seconds``."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=seconds)

    async def close(self, seconds: float = END_SECONDS) -> None:
        """Cancel all tasks and wait for their end, at most twice ``seconds``."""
        await end(*self._tasks, seconds=seconds)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task failed", task=task.get_name(), exc_info=error)


class SingleFlight(Generic[K, T]):
    """Share one running call among all callers with the same key.

    A cancelled caller leaves the call running for the others. Nothing is cached: the next caller after its end starts
    another one.
    """

    def __init__(self) -> None:
        self._running: dict[K, asyncio.Task[T]] = {}  # bounded by the waiting callers

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, key: K) -> bool:
        return key in self._running

    async def run(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the call that runs for ``key``; start ``work()`` if none does.

        Raises:
            Exception: any error of ``work``, to each caller.
        """
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(work())
            task.add_done_callback(lambda done: self._ended(key, done))
        return await asyncio.shield(task)

    async def wait(self, key: K) -> None:
        """Wait until the call that runs for ``key``, if any, has ended."""
        if key in self._running:
            await asyncio.wait({self._running[key]})

    def forget(self) -> None:
        """Make the next callers start calls of their own; waiting callers still get the running ones."""
        self._running.clear()

    def _ended(self, key: K, task: asyncio.Task[T]) -> None:
        if self._running.get(key) is task:
            del self._running[key]
        if not task.cancelled():
            task.exception()  # the callers get it; if all were cancelled, nobody does


async def wait_for_event(event: asyncio.Event, seconds: float) -> bool:
    """Wait until ``event`` is set, at most ``seconds``; return whether it is.

    Unlike `asyncio.wait_for` before Python 3.12 it never loses a cancellation of its caller.
    """
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
    return event.is_set()


async def together(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, U]) -> tuple[T, U]:
    """Run two coroutines at the same time; return both results.

    Raises:
        Exception: the first exception of either; the other coroutine is cancelled, and has ended by then.
    """
    tasks = (asyncio.create_task(first), asyncio.create_task(second))
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    return tasks[0].result(), tasks[1].result()


async def first_of(seconds: float | None, *waits: Awaitable[object]) -> None:
    """Return when the first of ``waits`` is done, or after ``seconds``; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
