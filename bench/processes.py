"""Start, watch and stop the processes of a run; all started processes are stopped."""

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
import psutil

__all__ = ["STOP_SECONDS", "Died", "Process", "Processes", "Spent", "TooLate", "fetch", "free_port", "python"]

STOP_SECONDS: Final = 8.0
POLL: Final = 0.02
PORTS: Final = range(10_000, 32_000)
_next_port = random.choice(PORTS)  # other processes search at the same time
_loopback = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class TooLate(Exception):
    """A condition did not hold in time."""


class Died(Exception):
    """A process ended while it was needed."""


class Spent(msgspec.Struct, frozen=True):
    """Processor seconds and peak resident memory in bytes of a process and its children so far."""

    cpu: float
    peak: int


class Process:
    """One process, with its output in a file."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, env: dict[str, str]) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        with self.log.open("ab") as output:
            # In a new session, so that Ctrl-C reaches only this process, which stops the others in order.
            self._popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
            )
        self.pid = self._popen.pid
        self._ps = psutil.Process(self.pid)

    @property
    def code(self) -> int | None:
        """Return the exit code, or ``None`` while it runs."""
        return self._popen.poll()

    def spent(self) -> Spent:
        """Return processor time and peak memory of the process and its children."""
        times = self._ps.cpu_times()
        cpu, peak = times.user + times.system + times.children_user + times.children_system, _peak(self._ps)
        for child in self._ps.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                own = child.cpu_times()
                cpu, peak = cpu + own.user + own.system, peak + _peak(child)
        return Spent(cpu, peak)

    def ending(self, lines: int = 15) -> str:
        """Return the last ``lines`` lines of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, signum: int = signal.SIGTERM, seconds: float = STOP_SECONDS) -> None:
        """Send ``signum``; kill the process and its children if it has not ended after ``seconds``."""
        if self.code is None:
            self._popen.send_signal(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait(STOP_SECONDS)


class Processes:
    """The processes of one run; leaving the block stops them in reverse order of start."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.env = env
        self.all: dict[str, Process] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = STOP_SECONDS
        for process in reversed(self.all.values()):
            try:
                process.stop(seconds=seconds)
            except KeyboardInterrupt:  # asked again while stopping: kill the rest, and leave none behind
                seconds = 0.0
                process.stop(seconds=seconds)

    def start(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> Process:
        """Start a process with additional environment variables."""
        process = Process(name, command, self.folder, {**self.env, **(env or {})})
        self.all[name] = process
        return process

    def check(self) -> None:
        """Check that no process has failed.

        Raises:
            Died: a process ended by itself with a failure.
        """
        for process in self.all.values():
            if process.code not in (None, 0):
                raise Died(f"{process.name} ended with code {process.code}; its last output:\n{process.ending()}")

    def spent(self) -> dict[str, Spent]:
        """Return processor time and peak memory of each running process."""
        found: dict[str, Spent] = {}
        for name, process in self.all.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                found[name] = process.spent()
        return found

    def wait(self, condition: Callable[[], bool], seconds: float, what: str, poll: float = POLL) -> None:
        """Wait until ``condition`` holds.

        Raises:
            TooLate: it did not hold within ``seconds``.
            Died: a process ended meanwhile.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                said = "\n".join(f"{p.name}: {p.ending(5)}" for p in self.all.values() if p.log.stat().st_size)
                raise TooLate(f"{what}: not within {seconds:.0f} s{chr(10) + said if said else ''}")
            time.sleep(poll)


def _peak(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return int(process.memory_info().rss)


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def free_port(row: int = 1) -> int:
    """Return the first of ``row`` neighbouring loopback ports that are free now.

    They are outside the system's ephemeral range, so a server that restarts finds its port free again. Later calls in
    this process return other ports.
    """
    global _next_port
    while True:
        if _next_port + row > PORTS.stop:
            _next_port = PORTS.start
        first, _next_port = _next_port, _next_port + row
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + row):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def fetch(url: str, *, method: str = "GET", timeout: float = 5.0) -> bytes | None:
    """Return the body of a 200 response from a loopback server, or ``None`` for any other result."""
    try:
        with _loopback.open(urllib.request.Request(url, method=method), timeout=timeout) as answer:
            return bytes(answer.read()) if answer.status == 200 else None
    except (http.client.HTTPException, OSError):  # a server that starts or ends may send anything
        return None
