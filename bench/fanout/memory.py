"""Memory of a process and its children: resident, and where the kernel tells it, its proportional share."""

import contextlib
from pathlib import Path

import msgspec
import psutil

__all__ = ["Memory", "memory_of"]


class Memory(msgspec.Struct, frozen=True):
    """Bytes; ``pss`` counts a page shared by n processes as its nth part, and is 0 where it cannot be read."""

    rss: int
    pss: int


def memory_of(pid: int) -> Memory:
    """Return what a process and its children take now. What the kernel keeps for their sockets is not in it."""
    rss = pss = 0
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            rss += each.memory_info().rss
            pss += _pss(each.pid)
    return Memory(rss, pss)


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
