"""Run a service: event loop, signals, exit codes."""

import asyncio
import atexit
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, NoReturn

import structlog
import uvloop

from services.kit.endings import CannotRun
from services.kit.http import PortTaken
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.private_files import UMASK
from services.kit.settings import SettingsError
from services.kit.shutdown import CUT, MARGIN, Stop, end, watch_over

__all__ = ["EXIT_UNUSABLE", "EXIT_USAGE", "run_service"]

log = structlog.get_logger()
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 3
EXIT_UNUSABLE: Final = 4
CUT_AGAIN: Final = 0.3
STARTING_CUT_AGAIN: Final = 1.0
GENERATORS_SECONDS: Final = 0.3


def run_service(main: Callable[[Stop], Awaitable[None]]) -> NoReturn:
    """Run ``main(stop)`` to its end and exit; SIGTERM and SIGINT set ``stop``, on which ``main`` returns.

    It has ``stop.drain`` and `CUT` seconds for that; then it is cancelled. A second signal cancels it at once, and so
    does the first one during start, while ``main`` does not wait for ``stop`` yet. The process ends within
    ``stop.drain`` and `MARGIN` seconds after the signal in any case.

    Files that it creates are private to its user.

    Exit codes: 0 stopped on request, 1 an internal error, 2 wrong settings or a taken port, 3 a dependency does not
    answer, 4 the stored data is damaged or of a newer version, `services.kit.shutdown.EXIT_STUCK` it did not end by
    itself.
    """
    os.umask(UMASK)
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        _exit(loop.run_until_complete(_run(main)))
    except Exception:
        sys.excepthook(*sys.exc_info())
        _exit(EXIT_FAILED)


async def _run(main: Callable[[Stop], Awaitable[None]]) -> int:
    stop = Stop()
    task = asyncio.ensure_future(main(stop))
    stop.on_set(lambda: _enforce_deadline(task, stop))
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, lambda: task.cancel() if stop.is_set() else stop.set())
    _settle_garbage_collection()
    try:
        return await _code(task, stop)
    finally:
        await end(*(asyncio.all_tasks() - {asyncio.current_task()}))
        async with _at_most(GENERATORS_SECONDS):
            await loop.shutdown_asyncgens()


def _enforce_deadline(task: asyncio.Future[None], stop: Stop) -> None:
    """Cancel ``task`` when its time is over, repeatedly: a cancellation can get lost in a library."""
    loop = asyncio.get_running_loop()
    if not stop.heeded:
        stop.drain = 0.0  # nothing runs yet
    watch_over(lambda: stop.left(MARGIN))

    def cut(again: float) -> None:
        if not task.done():
            task.cancel()
            loop.call_later(again, cut, again)

    def overdue() -> None:
        if not task.done():
            log.warning("service did not end in time and was cancelled", drain=stop.drain)
            cut(CUT_AGAIN)

    if stop.heeded:
        loop.call_later(stop.left(CUT), overdue)
    else:  # during start: do not wait for a broker that does not answer, up to half a minute
        cut(STARTING_CUT_AGAIN)


async def _code(task: asyncio.Future[None], stop: Stop) -> int:
    """Await the service and return its exit code."""
    await asyncio.wait({task})
    if task.cancelled() and stop.is_set():
        return 0
    try:
        task.result()
    except Exception as error:
        if _is_only(error, SettingsError, PortTaken):
            return _notify(error, EXIT_USAGE)
        if _is_only(error, CannotRun):
            return _notify(error, EXIT_UNUSABLE)
        if not _is_only(error, BrokerUnavailable):
            raise
        if not stop.is_set():
            return _notify(error, EXIT_UNAVAILABLE)
        log.warning("broker was away while the service stopped", error=str(_first(error)))
    return 0


def _is_only(error: BaseException, *kinds: type[Exception]) -> bool:
    """Return whether an error, or each one in a group of them, is of these kinds."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_only(each, *kinds) for each in error.exceptions)
    return isinstance(error, kinds)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _notify(error: BaseException, code: int) -> int:
    print(f"tailrace: {_first(error)}", file=sys.stderr)
    return code


def _exit(code: int) -> NoReturn:
    """End the process now, without waiting for threads of libraries, such as name resolution."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the stream may be closed
            stream.flush()
    os._exit(code)


@asynccontextmanager
async def _at_most(seconds: float) -> AsyncIterator[None]:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            yield


def _settle_garbage_collection() -> None:
    """Exempt imported objects from garbage collection, and collect the young generation less often.

    Streams make few reference cycles; the collector's default pace cost about 5 % of a busy process.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
