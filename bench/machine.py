"""The machine that is measured on, and the time of a measurement."""

import datetime
import os
import platform

import msgspec

__all__ = ["Machine", "machine", "now"]


class Machine(msgspec.Struct):
    """Where it was measured."""

    cores: int
    processor: str
    system: str
    python: str
    memory_gb: float


def machine() -> Machine:
    """Return what is known of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cores,
        _processor(),
        f"{platform.system()} {platform.release()}",
        platform.python_version(),
        round(memory / 1e9, 1),
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def now() -> str:
    """Return the present time for a report."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
