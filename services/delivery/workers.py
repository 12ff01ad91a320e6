"""Run several delivery processes behind one port: start, supervise, restart and stop them together.

The kernel spreads connections over the processes that listen on the port (SO_REUSEPORT). Like
replicas, they share only the log: a client may resume with any of them.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final

import structlog
from litestar import Litestar

from services.delivery import app, metrics
from services.delivery.settings import Settings
from services.kit.http import PortTaken, check_port, probes, serving
from services.kit.lifecycle import EXIT_USAGE
from services.kit.settings import SettingsError, load_settings
from services.kit.shutdown import ANSWERS, MARGIN, Stop
from services.kit.telemetry import configure_logging

__all__ = ["main", "restart_delay"]

log = structlog.get_logger()
FLAG: Final = "--worker"
HEALTHY_AFTER: Final = 60.0
PROBE_SECONDS: Final = 1.0
WORKER_SECONDS: Final = MARGIN + 1.0
"""Seconds beyond the drain time after which a worker is killed; it should have exited within `MARGIN`."""


def restart_delay(crashes: int) -> float:
    """Return the backoff in seconds after ``crashes`` (1, 2 …) consecutive crashes: 0.25 s, doubling up to 8 s."""
    return float(min(8.0, 0.25 * 2 ** min(crashes - 1, 5)))


async def main(stop: Stop) -> None:
    """Run delivery until ``stop``: in this process, or as the supervisor of its workers.

    Raises:
        SettingsError: a setting is wrong, here or in a worker.
        BrokerUnavailable: no broker answers at start.
        PortTaken: a port is in use.
    """
    number = _own_number(sys.argv[1:])
    if number is not None:
        async with _ending_with_the_starter(stop):
            await app.main(stop, worker=number)
        return
    shared, settings = load_settings(Settings, "delivery", os.environ)
    if settings.workers == 1:
        await app.main(stop)
        return
    configure_logging("delivery", shared.log_level, shared.log_format)
    await _watch_over(settings, stop)


def _own_number(arguments: list[str]) -> int | None:
    match arguments:
        case []:
            return None
        case [flag, number] if flag == FLAG and number.isdigit():
            return int(number)
        case _:
            raise SettingsError([f"{' '.join(arguments)}: delivery takes no arguments, only variables TAILRACE_…"])


async def _watch_over(settings: Settings, stop: Stop) -> None:
    stop.drain = settings.drain + WORKER_SECONDS
    workers = [_Worker(number, stop.drain) for number in range(1, settings.workers + 1)]

    async def all_run() -> bool:
        return all(worker.runs for worker in workers)

    litestar = Litestar([probes({"workers": all_run})], openapi_config=None, logging_config=None)
    with _reserved(settings):
        grace = lambda: min(PROBE_SECONDS, stop.left(ANSWERS))  # noqa: E731  # evaluated at shutdown
        async with serving(litestar, settings.host, settings.workers_port, connections=64, grace=grace):
            tasks = [asyncio.create_task(worker.run(stop)) for worker in workers]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            except asyncio.CancelledError:  # the process is being cancelled: kill the workers
                for task in tasks:
                    task.cancel()
                raise
            finally:
                stop.set()
                await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        task.result()


@contextmanager
def _reserved(settings: Settings) -> Iterator[None]:
    """Reserve the ports, without listening, while the block runs, so that they stay ours while a worker restarts."""
    host = settings.host
    held: list[socket.socket] = []
    for number in range(settings.workers + 1):
        check_port(host, settings.workers_port + number)
    try:
        for port in filter(None, (settings.port, settings.grpc_port)):
            check_port(host, port)
            held.append(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM))
            held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            try:
                held[-1].bind((host, port))
            except OSError as error:
                raise PortTaken(host, port, error.strerror or str(error)) from error
        yield
    finally:
        for holder in held:
            holder.close()


class _Worker:
    """Run one worker process and restart it. ``grace``: seconds between SIGTERM and SIGKILL."""

    def __init__(self, number: int, grace: float) -> None:
        self.number = number
        self._grace = grace
        self._process: asyncio.subprocess.Process | None = None

    @property
    def runs(self) -> bool:
        """Whether the worker's process is running."""
        return self._process is not None and self._process.returncode is None

    async def run(self, stop: Stop) -> None:
        """Keep the worker running until ``stop``, then end it.

        Raises:
            SettingsError: the worker exited because its settings are wrong or a port is taken; it is not restarted.
        """
        crashes = 0
        while not stop.is_set():
            started = time.monotonic()
            code = await self._run_once(stop)
            if stop.is_set():
                return
            if code == EXIT_USAGE:
                raise SettingsError([f"worker {self.number} could not start: its error is printed above"])
            crashes = 1 if time.monotonic() - started > HEALTHY_AFTER else crashes + 1
            delay = restart_delay(crashes)
            metrics.WORKER_RESTARTS.inc()
            log.warning("worker ended, restart scheduled", worker=self.number, code=code, seconds=delay)
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await stop.wait()

    async def _run_once(self, stop: Stop) -> int:
        # Standard input is a pipe without a writer: it closes when this process ends, even by SIGKILL.
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.delivery",
            FLAG,
            str(self.number),
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal reaches only this process
        )
        metrics.WORKERS.inc()
        ended = asyncio.ensure_future(process.wait())
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                process.send_signal(signal.SIGTERM)
                await asyncio.wait({ended}, timeout=self._grace)
            return process.returncode if process.returncode is not None else -signal.SIGKILL
        finally:
            stopping.cancel()
            if process.returncode is None:
                log.warning("worker did not end in time and was killed", worker=self.number, seconds=self._grace)
                with suppress(ProcessLookupError):
                    process.kill()
            await ended
            metrics.WORKERS.dec()


@asynccontextmanager
async def _ending_with_the_starter(stop: Stop) -> AsyncIterator[None]:
    """Set ``stop`` when the parent process has ended, which closes the other end of standard input."""
    loop = asyncio.get_running_loop()

    class Gone(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            stop.set()

    transport, _ = await loop.connect_read_pipe(Gone, sys.stdin)
    try:
        yield
    finally:
        transport.close()
