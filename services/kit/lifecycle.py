"""Running a service: event loop, signals, exit codes."""

import asyncio
import gc
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import structlog
import uvloop

from services.kit.broker import BrokerUnavailable
from services.kit.endings import CannotRun
from services.kit.http import PortTaken
from services.kit.settings import SettingsError

__all__ = ["EXIT_UNUSABLE", "EXIT_USAGE", "run_service"]

log = structlog.get_logger()
EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 3
EXIT_UNUSABLE: Final = 4


def run_service(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run ``main(stop)`` to its end and exit; SIGTERM and SIGINT set ``stop``, and ``main`` then ends by itself.

    While ``main`` still starts, and so does not wait for ``stop`` yet, it is cancelled instead.

    Exit codes: 0 stopped by wish, 2 wrong settings or a taken port, 3 a part that it needs does not answer, 4 what it
    keeps is damaged or of a newer version.
    """
    try:
        uvloop.run(_run(main))
    except* (SettingsError, PortTaken) as group:
        sys.exit(_say(group, EXIT_USAGE))
    except* BrokerUnavailable as group:
        sys.exit(_say(group, EXIT_UNAVAILABLE))
    except* CannotRun as group:
        sys.exit(_say(group, EXIT_UNUSABLE))


def _say(group: BaseExceptionGroup[Exception], code: int) -> int:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    print(f"tailrace: {error}", file=sys.stderr)
    return code


class _Stop(asyncio.Event):
    """The wish to stop. ``heeded``: somebody has come to wait for it, and ends the service in order."""

    heeded = False

    async def wait(self) -> Literal[True]:
        self.heeded = True
        return await super().wait()


async def _run(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stop = _Stop()
    task = asyncio.ensure_future(main(stop))

    def ask() -> None:
        stop.set()
        if not stop.heeded:
            task.cancel()  # a broker that does not answer would be waited for, up to half a minute

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, ask)
    _settle_garbage_collection()
    try:
        await task
    except asyncio.CancelledError:
        if not stop.is_set():
            raise


def _settle_garbage_collection() -> None:
    """Leave what the imports made out of every later collection, and collect the young less often.

    Streams make few reference cycles; the collector's default pace cost about 5 % of a busy process.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
