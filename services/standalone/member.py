"""Start, probe, restart and stop one service of the process tree."""

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx

from services.kit.processes import Crashes, end_process, signal_group
from services.kit.tasks import first_of
from services.standalone import embedded, leash
from services.standalone.backoff import MAX_CRASHES
from services.standalone.output import OutputFile
from services.standalone.plan import ServiceSpec

__all__ = ["Member"]

READY_TIMEOUT: Final = 60.0
PROBE_INTERVAL: Final = 0.05
HOPELESS: Final = (2, 4)
"""Exit codes for wrong settings, a taken port or damaged data: a restart would not help."""


class Member:
    """A service and its current process.

    ``ready`` is set when the service is ready for the first time. ``on_lost`` is called with the reason when it cannot
    be kept running, ``before_start`` before each start of a process.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        logs: Path,
        notify: Callable[[str], None],
        on_lost: Callable[[str], None],
        before_start: Callable[[ServiceSpec], None],
    ) -> None:
        self.spec = spec
        self._before_start = before_start
        self.ready = asyncio.Event()
        self.pid: int | None = None
        self._notify = notify
        self._on_lost = on_lost
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()
        self._restart = asyncio.Event()
        self._output = OutputFile(logs / f"{spec.name}.log", self._show)
        self._crashes = Crashes()

    async def run(self) -> None:
        """Keep the service running until `stop`, then end it. Return early when restarts are given up."""
        try:
            while not self._stop.is_set():
                started = time.monotonic()
                code = await self._run_once()
                if self._stop.is_set():
                    if code > 0:
                        self._notify(
                            f"{self.spec.name} {_describe(code)} while stopping; its log is {self._output.path}"
                        )
                    return
                if self._restart.is_set():
                    self._restart.clear()
                    continue
                delay = self._crashes.add(time.monotonic() - started)
                if self._is_hopeless(code):
                    self._on_lost(f"{self.spec.name} {_describe(code)}; its log is {self._output.path}")
                    return
                self._notify(f"{self.spec.name} {_describe(code)}; restarting it in {delay:g} s")
                await first_of(delay, self._stop.wait())
        finally:
            self._output.close()

    async def restart(self) -> None:
        """Replace the service's process; return when the new one is ready."""
        before = self.pid
        self._restart.set()
        async with httpx.AsyncClient(timeout=3, trust_env=False) as client:
            while self.pid in (None, before) or not await _is_ready(client, self.spec.ready):
                if self._stop.is_set():
                    return
                await asyncio.sleep(PROBE_INTERVAL)

    def stop(self) -> None:
        """Send SIGTERM to the service, and SIGKILL after its grace."""
        self._stop.set()

    def kill(self) -> None:
        """Kill the service at once."""
        self._stop.set()
        self._kill.set()

    def _is_hopeless(self, code: int) -> bool:
        return not self.ready.is_set() or code in HOPELESS or self._crashes.count >= MAX_CRASHES

    def _show(self, line: str) -> None:
        if not self._kill.is_set():
            self._notify(f"{self.spec.name}: {line}")

    async def _run_once(self) -> int:
        """Run one process until it ends or is stopped; return its exit code (negative: a signal)."""
        self._before_start(self.spec)
        process = await asyncio.create_subprocess_exec(
            *leash.command(self.spec.argv),
            env=self.spec.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal reaches only the supervisor
        )
        self.pid = process.pid
        try:
            async with asyncio.TaskGroup() as tasks:
                probe = tasks.create_task(self._probe())
                pump = tasks.create_task(self._pump(process))
                await first_of(None, process.wait(), self._stop.wait(), self._restart.wait())
                probe.cancel()
                await self._end(process)
                await first_of(1.0, asyncio.shield(pump))
                pump.cancel()
        finally:
            if process.returncode is None:
                signal_group(process.pid, signal.SIGKILL)
            self._output.finish()
            self.pid = None
        return await process.wait()

    async def _pump(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while data := await process.stdout.read(64 * 1024):
            self._output.feed(data)

    async def _probe(self) -> None:
        """Set ``ready`` when the service is ready; call ``on_lost`` when the first start exceeds `READY_TIMEOUT`."""
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                async with httpx.AsyncClient(timeout=3, trust_env=False) as client:
                    while not await _is_ready(client, self.spec.ready):  # noqa: ASYNC110  # the condition is in another process
                        await asyncio.sleep(PROBE_INTERVAL)
            self.ready.set()
        except TimeoutError:
            if not self.ready.is_set():
                self._on_lost(
                    f"{self.spec.name} was not ready within {READY_TIMEOUT:g} s; its log is {self._output.path}"
                )

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if not await end_process(process, self.spec.grace, self._kill) and not self._kill.is_set():
            self._notify(f"{self.spec.name} did not end within {self.spec.grace:g} s and is killed")


def _describe(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


async def _is_ready(client: httpx.AsyncClient, address: str) -> bool:
    url = urlsplit(address)
    if url.scheme == "nats":
        return await embedded.answers(url.port or 4222)
    try:
        return (await client.get(address)).status_code == 200
    except httpx.HTTPError:
        return False
