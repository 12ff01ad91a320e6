"""The profile of one process while it streams, taken by py-spy from outside."""

import shutil
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from bench.processes import Process

__all__ = ["Profile", "ProfilerMissing", "top_costs"]

SAMPLES_PER_SECOND: Final = 250
LONGEST: Final = 600
WAITING: Final = (
    "epoll_",
    "__futex",
    "futex",
    "pthread_cond",
    "__pthread_cond",
    "do_futex",
    "syscall",
    "clock_nanosleep",
)


class ProfilerMissing(Exception):
    """py-spy is not installed."""


class Profile:
    """Samples the process ``name`` into ``path`` as folded stacks (one a line, with its count)."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self._program = _py_spy()
        self._process: Process | None = None

    def start(self, processes: Mapping[str, Process]) -> None:
        """Begin to sample; without effect when the target has no such process."""
        watched = processes.get(self.name)
        if watched is None:
            return
        command = [self._program, "record", "--pid", str(watched.pid), "--native", "--function"]
        command += ["--format", "raw"]
        command += ["--rate", str(SAMPLES_PER_SECOND), "--duration", str(LONGEST), "--output", str(self.path)]
        self._process = Process("py-spy", command, watched.log.parent, {"PATH": "/usr/bin:/bin"})

    def stop(self) -> None:
        """End sampling and write the file."""
        if self._process is not None:
            self._process.stop(signal.SIGINT)
            self._process = None


def _py_spy() -> str:
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    if not found:
        raise ProfilerMissing("py-spy is not installed: pip install py-spy")
    return found


def top_costs(path: Path, count: int = 25) -> list[tuple[str, float, float]]:
    """Return the costliest functions of a profile: name, percent in itself, percent with all that it calls.

    Samples in which a thread waited are left out. Functions of C libraries are named like those of Python.
    """
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    samples = 0
    for line in path.read_text().splitlines():
        stack, _, times = line.rpartition(" ")
        frames = stack.split(";")
        if frames[-1].startswith(WAITING):
            continue
        samples += int(times)
        own[frames[-1]] += int(times)
        for frame in set(frames):
            total[frame] += int(times)
    return [(name, 100 * n / samples, 100 * total[name] / samples) for name, n in own.most_common(count)]
