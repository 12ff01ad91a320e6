"""Memory of a process and its children: resident, and, if the kernel reports it, proportional."""

import contextlib
from pathlib import Path

import msgspec
import psutil

__all__ = ["Memory", "memory_of"]


class Memory(msgspec.Struct, frozen=True):
    """Memory in bytes; ``pss`` counts 1/n of a page shared by n processes, and is 0 if it cannot be read."""

    rss: int
    pss: int


def memory_of(pid: int) -> Memory:
    """Return the current memory of a process and its children, without the kernel's socket buffers."""
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
