"""Profile one process with py-spy while it streams."""

import shutil
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from bench.processes import Process

__all__ = ["Profile", "ProfilerMissing", "Share", "top_costs"]

SAMPLES_PER_SECOND: Final = 250
LONGEST: Final = 600
PYTHON: Final = ".py:"
WAITING: Final = ("epoll_", "futex", "__futex", "pthread_cond", "sem_", "syscall", "clock_nanosleep")
LOCKING: Final = ("lock_PyThread_acquire_lock", "PyThread_acquire_lock", "take_gil")


class ProfilerMissing(Exception):
    """py-spy is not installed."""


class Share(NamedTuple):
    """A function's share of the time in percent: its own, and including the functions that it calls."""

    name: str
    own: float
    total: float


class Profile:
    """Sample the process ``name`` into ``path`` as folded stacks (one per line, with its count)."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self._program = _py_spy()
        self._process: Process | None = None

    def start(self, processes: Mapping[str, Process]) -> None:
        """Begin to sample; do nothing if the target has no such process."""
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


def top_costs(path: Path, count: int = 25) -> list[Share]:
    """Return the costliest functions of a profile: Python functions, then the C functions that they call.

    A Python function's own time includes the C functions that it calls. Samples of a waiting thread are omitted.
    """
    python: Counter[str] = Counter()
    native: Counter[str] = Counter()
    total: Counter[str] = Counter()
    samples = 0
    for line in path.read_text().splitlines():
        stack, _, times = line.rpartition(" ")
        frames = stack.split(";")
        if _waits(frames):
            continue
        samples += int(times)
        python[next((f for f in reversed(frames) if PYTHON in f), frames[0])] += int(times)
        if PYTHON not in frames[-1]:
            native[frames[-1]] += int(times)
        for frame in set(frames):
            total[frame] += int(times)
    rows = [*python.most_common(count), *native.most_common(count // 2)]
    return [Share(name, 100 * own / samples, 100 * total[name] / samples) for name, own in rows]


def _waits(frames: list[str]) -> bool:
    return frames[-1].startswith(WAITING) or any(frame.startswith(LOCKING) for frame in frames[-4:])
