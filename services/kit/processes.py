"""Supervision of child processes: restart delays, and an orderly end within a time limit."""

import asyncio
import os
import signal
from typing import Final

from services.kit.tasks import first_of

__all__ = ["HEALTHY_AFTER", "Crashes", "end_process", "restart_delay", "signal_group"]

HEALTHY_AFTER: Final = 60.0
"""Seconds of running after which earlier crashes no longer count."""


def restart_delay(crashes: int) -> float:
    """Return the backoff in seconds after ``crashes`` (1, 2 …) consecutive crashes: 0.25 s, doubling up to 8 s."""
    return float(min(8.0, 0.25 * 2 ** min(crashes - 1, 5)))


class Crashes:
    """Count the consecutive crashes of a process that is restarted."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, seconds: float) -> float:
        """Count a crash after ``seconds`` of running; return the seconds to wait before the restart."""
        self.count = 1 if seconds > HEALTHY_AFTER else self.count + 1
        return restart_delay(self.count)


async def end_process(process: asyncio.subprocess.Process, grace: float, hurry: asyncio.Event | None = None) -> bool:
    """Send SIGTERM to a process, and SIGKILL after ``grace`` seconds; return whether it ended without.

    ``hurry``: sends SIGKILL at once when it is set. The process leads a group of its own (``start_new_session``), and
    signals go to the group.
    """
    if process.returncode is None and not (hurry is not None and hurry.is_set()):
        signal_group(process.pid, signal.SIGTERM)
        await first_of(grace, process.wait(), *(() if hurry is None else (hurry.wait(),)))
    if process.returncode is not None:
        return True
    signal_group(process.pid, signal.SIGKILL)
    await process.wait()
    return False


def signal_group(pid: int, signum: int) -> None:
    """Send a signal to the process group of ``pid``; do nothing when it has ended."""
    try:
        os.killpg(pid, signum)
    except (ProcessLookupError, PermissionError):
        return
