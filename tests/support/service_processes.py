"""Services and subscribers as real processes: started on free ports until ready, and stopped afterwards."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
Lines = list[dict[str, Any]]


def clean_environment(**variables: str) -> dict[str, str]:
    """Return the environment without settings of services and keys of providers."""
    drop = ("TAILRACE_", "OPENAI_", "ANTHROPIC_", "CO_API", "OPENROUTER_", "COVERAGE_")
    return {k: v for k, v in os.environ.items() if not k.startswith(drop)} | variables


def wait_until_answers(url: str, process: subprocess.Popen[Any], log: Path, *, seconds: float = 60) -> None:
    """Wait for a 200 from ``url``; a process that ended before, or the deadline, is an error that shows its log."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=2).close()
            return
        time.sleep(0.05)
    raise AssertionError(f"{url} does not answer (exit code {process.poll()}):\n{log.read_text()[-3000:]}")


@contextlib.contextmanager
def running(argv: Sequence[str], env: dict[str, str], log: Path, ready: str, *, seconds: float = 60) -> Iterator[None]:
    """Run a process while the block runs; it must then end on SIGTERM within 30 seconds."""
    with log.open("wb") as output:
        process = subprocess.Popen(argv, env=env, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_answers(ready, process, log, seconds=seconds)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
            raise


@contextlib.contextmanager
def service(name: str, port: int, env: dict[str, str], folder: Path) -> Iterator[str]:
    """Run ``python -m services.<name>`` on a loopback port while the block runs; yields its address."""
    url = f"http://127.0.0.1:{port}"
    env = env | {f"TAILRACE_{name.upper()}_PORT": str(port)}
    with running([sys.executable, "-m", f"services.{name}"], env, folder / f"{name}.log", f"{url}/readyz"):
        yield url


class Subscriber:
    """A subscriber process; its events are read line by line."""

    def __init__(self, url: str, last_id: str = "") -> None:
        reader = Path(__file__).with_name("sse_reader.py")
        self._process = subprocess.Popen([sys.executable, str(reader), url, last_id], stdout=subprocess.PIPE, text=True)

    def read(self, count: int) -> Lines:
        """Return the next ``count`` events."""
        assert self._process.stdout is not None
        return [json.loads(self._process.stdout.readline()) for _ in range(count)]

    def read_to_the_end(self) -> Lines:
        """Return the remaining events until the response ends."""
        assert self._process.stdout is not None
        lines = [json.loads(line) for line in self._process.stdout]
        assert self._process.wait(10) == 0
        return lines

    def kill(self) -> None:
        """Kill the process with SIGKILL, without closing its connection in order."""
        self._process.kill()
        self._process.wait(10)


def log_events(lines: Lines) -> list[dict[str, Any]]:
    """Return the events of the log among a subscriber's messages, without control events."""
    return [line["event"] for line in lines if line["kind"] == "message"]


def text_of(lines: Lines) -> str:
    """Return the text of the answer, as a client joins it."""
    return "".join(event.get("text") or "" for event in log_events(lines))
