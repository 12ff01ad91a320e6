"""Running a service: event loop, signals, exit codes."""

import asyncio
import gc
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import uvloop

from services.kit.broker import BrokerUnavailable
from services.kit.http import PortTaken
from services.kit.settings import SettingsError

__all__ = ["EXIT_USAGE", "run_service"]

log = structlog.get_logger()
EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 3


def run_service(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run ``main(stop)`` to its end and exit; SIGTERM and SIGINT set ``stop``, and ``main`` then ends by itself.

    Exit codes: 0 stopped by wish, 2 wrong settings or a taken port, 3 a part that it needs does not answer.
    """
    try:
        uvloop.run(_run(main))
    except* (SettingsError, PortTaken) as group:
        sys.exit(_say(group, EXIT_USAGE))
    except* BrokerUnavailable as group:
        sys.exit(_say(group, EXIT_UNAVAILABLE))


def _say(group: BaseExceptionGroup[Exception], code: int) -> int:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    print(f"tailrace: {error}", file=sys.stderr)
    return code


async def _run(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    _settle_garbage_collection()
    await main(stop)


def _settle_garbage_collection() -> None:
    """Leave what the imports made out of every later collection, and collect the young less often.

    Streams make few reference cycles; the collector's default pace cost about 5 % of a busy process.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
