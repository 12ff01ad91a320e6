"""The shutdown of a process: its deadlines, and a watchdog that enforces them.

A service has two deadlines: its drain time, during which work may continue, and `MARGIN` seconds beyond it. The margin
is shared by the remaining steps, each with a deadline of its own, so that their times cannot add up:

========================= ===========================================
seconds beyond the drain  ended by then
========================= ===========================================
`HAND_OVER`               interrupted work is handed over or reported
`ANSWERS`                 open answers of HTTP and gRPC
`CUT`                     the service is cancelled, wherever it waits
`MARGIN`                  the process, by `watch_over`
========================= ===========================================
"""

import asyncio
import io
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, Final, Literal

import structlog

__all__ = ["ANSWERS", "CUT", "EXIT_STUCK", "HAND_OVER", "MARGIN", "Stop", "end", "until_drained", "watch_over"]

log = structlog.get_logger()
HAND_OVER: Final = 1.5
ANSWERS: Final = 2.0
CUT: Final = 3.5
MARGIN: Final = 5.0
EXIT_STUCK: Final = 5
"""Exit code of a process that did not end by itself within its drain time and `MARGIN`."""
END_SECONDS: Final = 0.5
_REPORT_SECONDS: Final = 0.5
_REPORT_LINES: Final = 200


class Stop(asyncio.Event):
    """The stop signal of a service; ``drain``: seconds for work in progress after it.

    ``heeded``: a task waits for it, and will end the service in order.
    """

    def __init__(self, drain: float = 0.0) -> None:
        super().__init__()
        self.drain = drain
        self.heeded = False
        self._asked_at: float | None = None
        self._asked: list[Callable[[], None]] = []

    def on_set(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the signal is set."""
        self._asked.append(callback)

    def set(self) -> None:
        """Set the signal; the drain time begins with the first call."""
        if self.is_set():
            return
        self._asked_at = time.monotonic()
        super().set()
        for callback in self._asked:
            callback()

    async def wait(self) -> Literal[True]:
        """Wait for the signal."""
        self.heeded = True
        return await super().wait()

    def left(self, beyond: float = 0.0) -> float:
        """Return the seconds until ``beyond`` seconds after the drain time, 0 afterwards; the whole time before the
        signal.
        """
        whole = self.drain + beyond
        if self._asked_at is None:
            return whole
        return max(0.0, self._asked_at + whole - time.monotonic())


async def until_drained(stop: Stop, work: Coroutine[Any, Any, None], *, seconds: float = END_SECONDS) -> None:
    """Run ``work``, which returns after ``stop``; cancel it when the drain time is over.

    It then has ``seconds`` to clean up, and as long again after a second cancellation.
    """
    task, asked = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await asyncio.wait({task}, timeout=stop.left())
        if not task.done():
            log.warning("work did not end within the drain time and was cancelled", drain=stop.drain)
    finally:
        await end(task, asked, seconds=seconds)
    if task.done() and not task.cancelled():
        task.result()


async def end(*tasks: asyncio.Task[Any], seconds: float = END_SECONDS) -> None:
    """Cancel tasks and wait for their end, twice ``seconds`` at most; log the names of those still running.

    A task is cancelled a second time if the first time did not end it: libraries lose cancellations.
    """
    pending = {task for task in tasks if not task.done()}
    for _ in range(2):
        for task in pending:
            task.cancel()
        if pending:
            _, pending = await asyncio.wait(pending, timeout=seconds)
    for task in pending:
        log.warning("task did not end when it was cancelled", task=task.get_name(), at=_place(task))


def _place(task: asyncio.Task[Any]) -> str:
    """Return where a task waits: its innermost frame."""
    frames = task.get_stack(limit=1)
    return f"{frames[-1].f_code.co_filename}:{frames[-1].f_lineno}" if frames else "unknown"


def watch_over(seconds: Callable[[], float]) -> None:
    """End this process with `EXIT_STUCK` after ``seconds``, unless it has ended; print its stacks before.

    ``seconds`` is polled until it is 0. Call it in the event loop whose tasks are printed.
    """
    loop = asyncio.get_running_loop()
    thread = threading.Thread(target=_watch, args=(loop, seconds), name="shutdown-watchdog", daemon=True)
    thread.start()


def _watch(loop: asyncio.AbstractEventLoop, seconds: Callable[[], float]) -> None:
    while (left := seconds()) > 0:
        time.sleep(left)
    written = threading.Event()

    def write() -> None:
        _write(_tasks(loop))
        written.set()

    log.error("service did not end in time and was killed", exit_code=EXIT_STUCK)
    try:
        loop.call_soon_threadsafe(write)
        written.wait(_REPORT_SECONDS)  # bounded: the event loop itself may be stuck
    except RuntimeError:
        pass  # it is closed
    if not written.is_set():
        _write(_threads())
    os._exit(EXIT_STUCK)


def _write(lines: str) -> None:
    sys.stderr.write("".join(lines.splitlines(keepends=True)[:_REPORT_LINES]))
    sys.stderr.flush()


def _tasks(loop: asyncio.AbstractEventLoop) -> str:
    out = io.StringIO()
    for task in asyncio.all_tasks(loop):
        task.print_stack(file=out)
    return out.getvalue()


def _threads() -> str:
    found = [
        f"thread {number}\n{''.join(traceback.format_stack(frame))}" for number, frame in sys._current_frames().items()
    ]
    return "".join(found)
