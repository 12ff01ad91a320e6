"""Delivery as processes: drained, killed and replaced while answers stream through it."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.processes import free_port
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, keys, story
from tests.support.service_processes import REPOSITORY, clean_environment, wait_until_answers
from tests.support.sse_client import SseClient

pytestmark = pytest.mark.acceptance
EVENTS = story("g1", 400)


class DeliveryProcess:
    """``python -m services.delivery`` on a port of its own."""

    def __init__(self, nats_url: str, folder: Path, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"delivery-{self.port}-{len(list(folder.iterdir()))}.log"
        env = clean_environment(
            TAILRACE_NATS_URL=nats_url, TAILRACE_DELIVERY_PORT=str(self.port), TAILRACE_LOG_FORMAT="json"
        )
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.delivery"], env=env, cwd=REPOSITORY, stdout=output, stderr=output
            )

    def ready(self) -> "DeliveryProcess":
        wait_until_answers(f"{self.url}/readyz", self.process, self.log)
        return self

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def start(nats_url: str, tmp_path: Path) -> Iterator:  # type: ignore[type-arg]
    started: list[DeliveryProcess] = []

    def begin(port: int | None = None) -> DeliveryProcess:
        started.append(DeliveryProcess(nats_url, tmp_path, port))
        return started[-1].ready()

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.terminate()
            one.process.wait(30)
        assert "Traceback" not in one.log.read_text(), one.log.read_text()[-3000:]


async def test_drained_process_sends_bye_and_another_process_continues(broker: Broker, start) -> None:  # type: ignore[no-untyped-def]
    one, other = start(), start()
    async with httpx.AsyncClient(timeout=15) as http:
        readers = [SseClient(http, f"{one.url}/v1/sessions/s/events", **{"from": "start"}) for _ in range(5)]

        async def read(reader: SseClient) -> None:
            assert await reader.read_all() == 200
            assert reader.controls == [("bye", {"reason": "drain", "cursor": reader.last_id})]
            reader.url = reader.url.replace(one.url, other.url)
            await reader.follow(lambda r: len(r.events) == len(EVENTS))

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(Log(broker).append(*EVENTS, pause=0.005))
            for reader in readers:
                group.create_task(read(reader))
            await eventually(lambda: min(len(r.events) for r in readers) > 50)
            one.terminate()
        assert await asyncio.to_thread(one.process.wait, 20) == 0
    assert all(keys(reader.events) == keys(EVENTS) for reader in readers)
    assert all(len(set(reader.ids)) == len(reader.ids) for reader in readers)


async def test_killed_and_restarted_process_loses_no_event(broker: Broker, start) -> None:  # type: ignore[no-untyped-def]
    one = start()
    async with httpx.AsyncClient(timeout=15) as http:
        readers = [SseClient(http, f"{one.url}/v1/sessions/s/events", **{"from": "start"}) for _ in range(5)]
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(Log(broker).append(*EVENTS, pause=0.005))
            for reader in readers:
                group.create_task(reader.follow(lambda r: len(r.events) == len(EVENTS)))
            for share in (0.2, 0.5):
                await eventually(lambda share=share: min(len(r.events) for r in readers) > share * len(EVENTS))
                one.kill()
                one = await asyncio.to_thread(start, one.port)
    assert all(keys(reader.events) == keys(EVENTS) for reader in readers)
    assert all(len(set(reader.ids)) == len(reader.ids) for reader in readers)


async def test_process_with_idle_streams_ends_at_once_and_cleanly(broker: Broker, start) -> None:  # type: ignore[no-untyped-def]
    one = start()
    async with httpx.AsyncClient(timeout=15) as http:
        readers = [SseClient(http, f"{one.url}/v1/sessions/idle/events") for _ in range(20)]
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            tasks = [group.create_task(reader.read_all()) for reader in readers]
            await eventually(lambda: all(reader.retry for reader in readers))
            one.terminate()
        assert [task.result() for task in tasks] == [200] * 20
    assert await asyncio.to_thread(one.process.wait, 10) == 0
    assert all(reader.controls[0][1]["reason"] == "drain" for reader in readers)


async def test_invalid_setting_and_port_in_use_are_reported_in_one_line(
    own_nats: NatsServer, start, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    one = start()

    def attempt(**variables: str) -> tuple[int, str]:
        env = clean_environment(TAILRACE_NATS_URL=own_nats.url, **variables)
        done = subprocess.run(
            [sys.executable, "-m", "services.delivery"],
            env=env,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stderr

    code, said = await asyncio.to_thread(attempt, TAILRACE_DELIVERY_PORT=str(one.port))
    assert code == 2
    assert str(one.port) in said
    assert "Traceback" not in said
    code, said = await asyncio.to_thread(attempt, TAILRACE_DELIVERY_FEED_BYTES="few")
    assert code == 2
    assert "TAILRACE_DELIVERY_FEED_BYTES" in said
    assert "Traceback" not in said


async def test_logs_are_lines_of_json(broker: Broker, start) -> None:  # type: ignore[no-untyped-def]
    one = start()
    async with httpx.AsyncClient(timeout=15) as http:
        await http.get(f"{one.url}/v1/sessions/s/generations/unknown")
        await http.post(f"{one.url}/v1/sessions/s/generations", content=b"\xff")
    one.terminate()
    assert await asyncio.to_thread(one.process.wait, 20) == 0
    for line in one.log.read_text().splitlines():
        assert json.loads(line)["level"] in ("info", "warning")
