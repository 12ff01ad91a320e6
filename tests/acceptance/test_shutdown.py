"""Test that SIGTERM ends each service within its drain time and margin, in every state of the broker."""

import asyncio
import http.client
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from bench.processes import free_port
from services.kit.jetstream.broker import Broker
from services.kit.shutdown import MARGIN
from tests.conftest import nats_server_path, require
from tests.support.nats_cluster import Cluster
from tests.support.producer_worker import ask, enqueue
from tests.support.service_processes import REPOSITORY, clean_environment, wait_until_answers

pytestmark = pytest.mark.acceptance
SERVICES: Final = ("producer", "delivery", "billing")
PHASES: Final = ("starting", "running", "draining")
DRAIN: Final = 1.0
LOADED: Final = 3.0
"""Seconds more that a busy machine may take to let a process end, and us see it."""
ENDLESS: Final = {"tokens": 20, "stall_after": 2, "tokens_per_second": 1_000}
"""An answer that stalls until its deadline."""


class Ending(NamedTuple):
    """The end of a process: exit code, seconds after SIGTERM, and its log."""

    code: int
    seconds: float
    log: str


class Service:
    """A process of a service; ``name`` is also its pool and the folder of its data."""

    def __init__(self, service: str, phase: str, url: str, folder: Path, replicas: int = 1, **settings: str) -> None:
        self.service = service
        self.pool = f"{service}-{phase}"
        self.port = free_port()
        self.log = folder / f"{self.pool}.log"
        self._took: float | None = None
        self._watch: threading.Thread | None = None
        upper = service.upper()
        env = clean_environment(
            TAILRACE_NATS_URL=url,
            TAILRACE_POOL=self.pool,
            TAILRACE_DATA=str(folder / self.pool),
            TAILRACE_REPLICAS=str(replicas),
            **{f"TAILRACE_{upper}_PORT": str(self.port), f"TAILRACE_{upper}_DRAIN": f"{DRAIN:g}"},
            **settings,
        )
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"services.{service}"], env=env, cwd=REPOSITORY, stdout=output, stderr=output
            )

    def until_ready(self) -> None:
        wait_until_answers(f"http://127.0.0.1:{self.port}/readyz", self.process, self.log)

    def until_it_listens_for_signals(self) -> None:
        wait(lambda: self.process.poll() is not None or catches_sigterm(self.process.pid))

    def terminate(self) -> None:
        asked_at = time.monotonic()
        self.process.send_signal(signal.SIGTERM)

        def watch() -> None:
            self.process.wait()
            self._took = time.monotonic() - asked_at

        self._watch = threading.Thread(target=watch, daemon=True)
        self._watch.start()

    def ending(self) -> Ending:
        assert self._watch is not None
        self._watch.join(60)
        assert self._took is not None, f"it does not end:\n{self.log.read_text()}"
        return Ending(self.process.returncode, self._took, self.log.read_text())


def catches_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def wait(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not become true in time"
        time.sleep(0.02)


class Server:
    """A nats-server whose only user may publish, until `refuse`."""

    replicas = 1

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"nats://user:secret@127.0.0.1:{port}"
        self._config = folder / "nats.conf"
        self._text = f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{folder}/nats" }}\n'
        self._write("allow")
        self.process = subprocess.Popen(
            [nats_server_path(), "-c", str(self._config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _write(self, verb: str) -> None:
        user = f'{{user: user, password: secret, permissions: {{publish: {{{verb}: ">"}}, subscribe: ">"}}}}'
        self._config.write_text(f"{self._text}authorization {{ users: [{user}] }}\n")

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def refuse(self) -> None:
        self._write("deny")
        self.process.send_signal(signal.SIGHUP)

    def close(self) -> None:
        self.kill()


class Trio:
    """Three nats-servers as one cluster."""

    replicas = 3

    def __init__(self, folder: Path) -> None:
        self._cluster = Cluster(folder / "cluster")
        asyncio.run(self._cluster.whole())
        self.url = self._cluster.url

    def lose_the_leader(self) -> None:
        for node in self._cluster.nodes[:2]:
            node.kill()

    def close(self) -> None:
        self._cluster.stop()


FAULTS: Final[dict[str, tuple[type[Server | Trio], Callable[[Server | Trio], None]]]] = {
    "frozen": (Server, Server.freeze),  # type: ignore[dict-item]  # each with its own kind of broker
    "gone": (Server, Server.kill),  # type: ignore[dict-item]
    "leaderless": (Trio, Trio.lose_the_leader),  # type: ignore[dict-item]
    "refusing": (Server, Server.refuse),  # type: ignore[dict-item]
}


async def start_answers(url: str, pools: list[str]) -> None:
    async with Broker.connect(url, "test") as broker:
        for pool in pools:
            request = ask(f"g-{pool}", "scripted/stall", session="s", params=ENDLESS)
            await enqueue(broker, request, pool)


def watch(service: Service) -> http.client.HTTPResponse:
    """Open a stream of events and leave it open."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    connection.request("GET", "/v1/sessions/s/events?from=start")
    return connection.getresponse()


def end_all(fault: str, folder: Path) -> dict[tuple[str, str], Ending]:
    """Bring every service into every phase, let the broker fail, and return how each ended."""
    kind, fail = FAULTS[fault]
    broker = kind(folder)
    cells: dict[tuple[str, str], Service] = {}
    try:
        for phase in ("running", "draining"):
            for name in SERVICES:
                cells[name, phase] = Service(name, phase, broker.url, folder, broker.replicas)
        for service in cells.values():
            service.until_ready()
        asyncio.run(start_answers(broker.url, [s.pool for s in cells.values() if s.service == "producer"]))
        streams = [watch(service) for service in cells.values() if service.service == "delivery"]
        busy = "tailrace_producer_active_generations 1.0"
        for service in (s for s in cells.values() if s.service == "producer"):
            wait(lambda service=service: busy in metrics(service))  # type: ignore[misc]
        for name in SERVICES:
            cells[name, "draining"].terminate()
        fail(broker)
        for name in SERVICES:
            cells[name, "running"].terminate()
            cells[name, "starting"] = Service(name, "starting", broker.url, folder, broker.replicas)
        for name in SERVICES:
            cells[name, "starting"].until_it_listens_for_signals()
            cells[name, "starting"].terminate()
        endings = {cell: service.ending() for cell, service in cells.items()}
        for stream in streams:
            stream.close()
        return endings
    finally:
        for service in cells.values():
            if service.process.poll() is None:
                service.process.kill()
            service.process.wait(10)
        broker.close()


def metrics(service: Service) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    connection.request("GET", "/metrics")
    return connection.getresponse().read().decode()


@pytest.fixture(scope="module", params=FAULTS)
def endings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Ending]:
    """How every service ended in every phase; they all end beside each other."""
    require(Path("/proc/self/status").exists(), "only Linux shows which signals a process catches")
    return end_all(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_ends_within_its_drain_time_and_margin(
    endings: dict[tuple[str, str], Ending], service: str, phase: str
) -> None:
    ending = endings[service, phase]
    assert ending.code == 0, ending.log
    assert ending.seconds < (0.0 if phase == "starting" else DRAIN) + MARGIN + LOADED
    assert "Traceback" not in ending.log
    assert "did not end in time" not in ending.log, "a wait on the way out had no bound of its own"
    assert "did not end when it was cancelled" not in ending.log


def test_the_worker_supervisor_ends_with_its_workers_while_the_broker_is_frozen(tmp_path: Path) -> None:
    broker = Server(tmp_path)
    settings = {"TAILRACE_DELIVERY_WORKERS": "2", "TAILRACE_DELIVERY_WORKERS_PORT": str(free_port(3))}
    service = Service("delivery", "running", broker.url, tmp_path, **settings)
    try:
        service.until_ready()
        broker.freeze()
        service.terminate()
        ending = service.ending()
    finally:
        service.process.kill()
        service.process.wait(10)
        broker.close()
    assert ending.code == 0, ending.log
    assert ending.seconds < DRAIN + MARGIN + LOADED
    assert "killed" not in ending.log
