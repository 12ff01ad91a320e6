"""Workers of delivery: processes that share the ports, lost and started again, stopped together."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import psutil
import pytest

from bench.processes import free_port
from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from services.kit.jetstream.broker import Broker
from services.kit.processes import restart_delay
from tests.conftest import eventually
from tests.support.delivery_server import Log, keys, story
from tests.support.grpc_server import Client, Read
from tests.support.service_processes import REPOSITORY, clean_environment, wait_until_answers
from tests.support.sse_client import SseClient

pytestmark = pytest.mark.acceptance
EVENTS = story("g1", 300)


class Workers:
    """``python -m services.delivery`` with several workers."""

    def __init__(self, nats_url: str, log: Path, count: int = 2, **variables: str) -> None:
        self.count = count
        self.port, self.grpc_port, self.own = free_port(1), free_port(1), free_port(count + 1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        env = clean_environment(
            TAILRACE_NATS_URL=nats_url,
            TAILRACE_DELIVERY_PORT=str(self.port),
            TAILRACE_DELIVERY_GRPC_PORT=str(self.grpc_port),
            TAILRACE_DELIVERY_WORKERS=str(count),
            TAILRACE_DELIVERY_WORKERS_PORT=str(self.own),
            TAILRACE_LOG_FORMAT="json",
            **variables,
        )
        with log.open("wb") as output:
            argv = [sys.executable, "-m", "services.delivery"]
            self.process = subprocess.Popen(argv, env=env, cwd=REPOSITORY, stdout=output, stderr=output)

    def of(self, number: int) -> str:
        """Return the URL of one worker's probes; 0 is the supervisor."""
        return f"http://127.0.0.1:{self.own + number}"

    def ready(self) -> "Workers":
        for number in range(1, self.count + 1):
            wait_until_answers(f"{self.of(number)}/readyz", self.process, self.log)
        return self

    def pids(self) -> list[int]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return sorted(child.pid for child in psutil.Process(self.process.pid).children())
        return []

    async def metric(self, number: int, name: str) -> float:
        async with httpx.AsyncClient(timeout=10) as http:
            text = (await http.get(f"{self.of(number)}/metrics")).text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, flags=re.MULTILINE))


Start = Callable[..., Workers]


@pytest.fixture
def start(nats_url: str, tmp_path: Path) -> Iterator[Start]:
    started: list[Workers] = []

    def begin(count: int = 2, **variables: str) -> Workers:
        started.append(Workers(nats_url, tmp_path / f"workers-{len(started)}.log", count, **variables))
        return started[-1].ready()

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            one.process.wait(40)
        assert "Traceback" not in one.log.read_text(), one.log.read_text()[-3000:]


def new_connection() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=15, limits=httpx.Limits(max_keepalive_connections=0))


async def test_connections_are_spread_and_each_worker_counts_its_own(broker: Broker, start: Start) -> None:
    workers = start()
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(new_connection())

        async def both_serve() -> bool:
            reader = SseClient(http, f"{workers.url}/v1/sessions/s/events")
            await stack.enter_async_context(reader.connected())
            name = "tailrace_delivery_subscribers"
            return min([await workers.metric(n, name) for n in (1, 2)]) > 0

        await eventually(both_serve, timeout=30)
    assert await workers.metric(0, "tailrace_delivery_workers") == 2


async def test_killed_worker_is_restarted_and_no_subscriber_misses_an_event(broker: Broker, start: Start) -> None:
    workers = start()
    before = workers.pids()
    assert len(before) == 2
    async with new_connection() as http:
        readers = [SseClient(http, f"{workers.url}/v1/sessions/s/events", **{"from": "start"}) for _ in range(8)]
        async with asyncio.timeout(90), asyncio.TaskGroup() as group:
            group.create_task(Log(broker).append(*EVENTS, pause=0.01))
            for reader in readers:
                group.create_task(reader.follow(lambda r: len(r.events) == len(EVENTS)))
            await eventually(lambda: min(len(r.events) for r in readers) > 50, timeout=30)
            os.kill(before[0], signal.SIGKILL)
        await eventually(lambda: len(workers.pids()) == 2 and before[0] not in workers.pids(), timeout=30)
        await asyncio.to_thread(workers.ready)
    assert all(keys(reader.events) == keys(EVENTS) for reader in readers)
    assert all(len(set(reader.ids)) == len(reader.ids) for reader in readers)
    assert before[1] in workers.pids()
    assert await workers.metric(0, "tailrace_delivery_worker_restarts_total") == 1


async def test_resume_over_grpc_continues_on_any_worker(broker: Broker, start: Start) -> None:
    workers = start()
    await Log(broker).append(*EVENTS)
    got = Read()
    while len(got.events) < len(EVENTS):
        # A connection of its own for each: the kernel chooses the worker anew.
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{workers.grpc_port}", options=options) as channel:
            after = got.cursors[-1] if got.events else ""
            call = Client(channel).read(pb.ReadRequest(session="s", begin=pb.BEGIN_START, after=after))
            response = await asyncio.wait_for(call.read(), 15)
            one = pb.ReadResponse(frames=response.frames[:40])
            got.take(one)
            call.cancel()
    assert got.keys == keys(EVENTS)


async def test_sigterm_drains_every_worker_and_ends_cleanly(broker: Broker, start: Start) -> None:
    workers = start()
    async with new_connection() as http:
        readers = [SseClient(http, f"{workers.url}/v1/sessions/idle/events") for _ in range(10)]
        async with asyncio.timeout(40), asyncio.TaskGroup() as group:
            tasks = [group.create_task(reader.read_all()) for reader in readers]
            await eventually(lambda: all(reader.retry for reader in readers), timeout=30)
            workers.process.terminate()
        assert [task.result() for task in tasks] == [200] * 10
    assert await asyncio.to_thread(workers.process.wait, 30) == 0
    assert all(reader.controls[0][1]["reason"] == "drain" for reader in readers)


async def test_workers_end_when_their_supervisor_is_killed(broker: Broker, start: Start) -> None:
    workers = start()
    processes = [psutil.Process(pid) for pid in workers.pids()]
    workers.process.kill()
    workers.process.wait(10)
    await eventually(lambda: not any(p.is_running() and p.status() != "zombie" for p in processes), timeout=40)


@pytest.mark.parametrize("taken", ["port", "grpc_port", "own"])
async def test_port_in_use_is_reported_before_any_worker_starts(broker: Broker, start: Start, taken: str) -> None:
    first = start()

    def attempt() -> tuple[int, str]:
        variables = {
            "TAILRACE_NATS_URL": "nats://127.0.0.1:1",
            "TAILRACE_DELIVERY_WORKERS": "2",
            "TAILRACE_DELIVERY_PORT": str(first.port if taken == "port" else free_port(1)),
            "TAILRACE_DELIVERY_GRPC_PORT": str(first.grpc_port if taken == "grpc_port" else free_port(1)),
            "TAILRACE_DELIVERY_WORKERS_PORT": str(first.own if taken == "own" else free_port(3)),
        }
        argv: list[Any] = [sys.executable, "-m", "services.delivery"]
        env = clean_environment(**variables)
        done = subprocess.run(argv, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    code, said = await asyncio.to_thread(attempt)
    assert code == 2
    assert str(getattr(first, taken)) in said
    assert "Traceback" not in said


async def test_setting_that_a_worker_refuses_ends_all_of_them(broker: Broker, nats_url: str, tmp_path: Path) -> None:
    workers = Workers(nats_url, tmp_path / "log", TAILRACE_DELIVERY_HOST="0.0.0.0")  # without credentials
    assert await asyncio.to_thread(workers.process.wait, 60) == 2
    said = workers.log.read_text()
    assert "TAILRACE_ADMIN_KEY_HASH" in said
    assert "Traceback" not in said


def test_pauses_before_a_restart_grow_to_a_bound() -> None:
    assert [restart_delay(n) for n in (1, 2, 3, 6, 7, 1_000)] == [0.25, 0.5, 1.0, 8.0, 8.0, 8.0]
