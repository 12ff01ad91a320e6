"""Test answers on a broker with a slow disk: the kernel throttles its block device for that process.

The server stores with ``sync_interval: always``, so that every append waits for the device: less than a millisecond
without the throttle, and a hundred or more with it. It acknowledges what it found in its queue together, so that the
first acknowledgement of a backlog comes when all of it is stored.
"""

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from bench.processes import free_port
from schemas.topology import Topology
from services.kit.jetstream.broker import Broker
from services.producer.adapters import publisher
from tests.conftest import eventually, nats_server_path, require
from tests.support.delivery_server import Stage, delivering
from tests.support.producer_worker import producing
from tests.support.sse_client import SseClient

WRITES = 60  # a second; one append needs several
RIDE = 60.0


class Disk:
    """A nats-server and the throttle of its disk: a control group of the blkio controller (version 1)."""

    def __init__(self, folder: Path, group: Path) -> None:
        self.url = f"nats://127.0.0.1:{free_port()}"
        self._group = group
        device = os.stat(folder).st_dev
        self._device = f"{os.major(device)}:{os.minor(device)}"
        config = folder / "nats.conf"
        config.write_text(
            f'listen: "{self.url.removeprefix("nats://")}"\n'
            f'jetstream {{ store_dir: "{folder / "store"}", sync_interval: always }}\n'
        )
        self._process = subprocess.Popen([nats_server_path(), "-c", str(config)], stderr=subprocess.DEVNULL)
        (group / "cgroup.procs").write_text(str(self._process.pid))

    def slow(self) -> None:
        self._limit(WRITES)

    def heal(self) -> None:
        self._limit(0)

    def _limit(self, writes: int) -> None:
        (self._group / "blkio.throttle.write_iops_device").write_text(f"{self._device} {writes}")

    def stop(self) -> None:
        self.heal()
        self._process.kill()
        self._process.wait(30)


def mounted(folder: Path) -> bool:
    if os.geteuid() != 0:
        return False
    command = ["mount", "-t", "cgroup", "-o", "blkio", "none", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.fixture
def disk() -> Iterator[Disk]:
    # Beside the code and not in /tmp, which may be in memory.
    folder = Path(tempfile.mkdtemp(prefix="tailrace-slow-disk-", dir="/var/tmp"))
    hierarchy = folder / "blkio"
    hierarchy.mkdir()
    try:
        if not mounted(hierarchy):
            pytest.skip(
                "the kernel's blkio controller cannot be used here: it takes root and control groups of version 1"
            )
        group = hierarchy / f"tailrace-{os.getpid()}"
        group.mkdir()
        throttle = group / "blkio.throttle.write_iops_device"
        try:
            require(throttle.exists(), "this kernel throttles no block devices")
            started = Disk(folder, group)
            try:
                yield started
            finally:
                started.stop()
        finally:
            group.rmdir()
            subprocess.run(["umount", str(hierarchy)], check=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def text_of(client: SseClient) -> str:
    return "".join(event.get("text", "") for event in client.events)


def whole(client: SseClient) -> bool:
    return bool(client.events) and client.events[-1]["type"] == "completed"


async def asked(stage: Stage, session: str, speed: float) -> SseClient:
    body = {
        "model": "scripted/story",
        "messages": [{"role": "user", "content": "rivers"}],
        "params": {"tokens": 120, "tokens_per_second": speed},
    }
    answer = await stage.http.post(f"{stage.url}/v1/sessions/{session}/generations", json=body, timeout=20)
    assert answer.status_code == 202
    return stage.events(session, **{"from": "start"})


def window() -> float:
    return REGISTRY.get_sample_value("tailrace_producer_publish_window_events") or 0.0


@pytest.mark.parametrize("events", [8, 512])
async def test_an_answer_is_complete_on_a_slow_disk(disk: Disk, monkeypatch: pytest.MonkeyPatch, events: int) -> None:
    monkeypatch.setattr(publisher, "WINDOW_EVENTS", events)
    async with Broker.connect(disk.url, "test-producer") as broker:
        await broker.apply(Topology())
        async with delivering(disk.url) as stage, producing(broker):
            expected = await asked(stage, "undisturbed", 0)
            async with asyncio.timeout(RIDE):
                await expected.follow(whole)
            client = await asked(stage, "s", 30)
            following = asyncio.create_task(client.follow(whole))
            try:
                await eventually(lambda: len(client.events) > 10, timeout=RIDE)
                disk.slow()
                await eventually(lambda: window() >= min(events, 10), timeout=RIDE)
                heard = len(client.events)
                await eventually(lambda: len(client.events) > heard + 3, timeout=RIDE)
                disk.heal()
                async with asyncio.timeout(RIDE):
                    await following
            finally:
                following.cancel()
            again = stage.events("s", **{"from": "start"})
            async with asyncio.timeout(RIDE):
                await again.follow(whole)
    assert text_of(client) == text_of(expected)
    assert [event["seq"] for event in client.events] == list(range(len(client.events)))
    assert again.events == client.events
