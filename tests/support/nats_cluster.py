"""Three real nats-servers that form one JetStream cluster on loopback; each can be killed, stopped, paused, started.

Load it with ``pytest_plugins = ["tests.support.nats_cluster"]``. The fixture ``cluster`` is complete and empty when a
test begins, whatever the previous test did to it.
"""

import asyncio
import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import nats.errors
import pytest
from nats.js import errors as js_errors

from bench.processes import free_port
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from tests.conftest import empty, eventually, nats_server_path

__all__ = ["Cluster", "Node"]

SIZE: Final = 3
FORMED: Final = 40.0  # seconds; an election takes 4 to 9 s, and two may be needed


class Node:
    """One server. ``index`` counts from 0; its name is ``n<index>``."""

    def __init__(self, index: int, folder: Path, port: int, config: str) -> None:
        self.index = index
        self.name = f"n{index}"
        self.port = port
        self.url = f"nats://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.paused = False
        self.log = folder / f"{self.name}.log"
        self._config = folder / f"{self.name}.conf"
        self._config.write_text(config)

    def start(self) -> None:
        """Start the server, or resume a paused one. `Cluster.whole` waits until it takes part."""
        self.resume()
        if self.process is None:
            with self.log.open("ab") as output:
                self.process = subprocess.Popen(
                    [nats_server_path(), "-c", str(self._config)], stdout=output, stderr=output
                )

    def kill(self) -> None:
        """End it as a crash does (SIGKILL)."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process, self.paused = None, False

    def stop(self) -> None:
        """End it in order (SIGTERM)."""
        if self.process is not None:
            self.resume()
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
            self.process = None

    def pause(self) -> None:
        """Stop its clock (SIGSTOP): connections stay open and nothing is answered."""
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)
            self.paused = True

    def resume(self) -> None:
        """Resume after `pause`."""
        if self.process is not None and self.paused:
            self.process.send_signal(signal.SIGCONT)
            self.paused = False


class Cluster:
    """The servers together. ``extra`` is added to each one's configuration."""

    def __init__(self, folder: Path, *, extra: str = "") -> None:
        ports, routes = [free_port() for _ in range(SIZE)], [free_port() for _ in range(SIZE)]
        folder.mkdir(parents=True, exist_ok=True)
        self.nodes = [Node(i, folder, ports[i], _config(i, folder, ports[i], routes, extra)) for i in range(SIZE)]
        self.url = ",".join(node.url for node in self.nodes)

    def start(self) -> None:
        """Start all servers that do not run."""
        for node in self.nodes:
            node.start()

    def stop(self) -> None:
        """End all servers."""
        for node in self.nodes:
            node.kill()

    def node(self, name: str) -> Node:
        """Return the server of that name, as the broker reports it."""
        return next(node for node in self.nodes if node.name == name)

    def url_without(self, *nodes: Node) -> str:
        """Return the addresses of all other servers."""
        return ",".join(node.url for node in self.nodes if node not in nodes)

    async def leader(self, broker: Broker, stream: str) -> Node:
        """Return the server that leads a stream, waiting for one."""

        async def found() -> str | None:
            return (await _cluster_of(broker, stream)).get("leader")

        return self.node(await eventually(found, timeout=FORMED, interval=0.1))

    async def followers(self, broker: Broker, stream: str) -> list[Node]:
        """Return the servers that hold a stream's other replicas."""
        leader = await self.leader(broker, stream)
        return [node for node in self.nodes if node is not leader]

    async def step_down(self, broker: Broker, stream: str) -> None:
        """Let the stream's leader give its place to another server."""
        before = await self.leader(broker, stream)
        await broker.request(f"$JS.API.STREAM.LEADER.STEPDOWN.{stream}", timeout=5)

        async def moved() -> bool:
            return (await _cluster_of(broker, stream)).get("leader") not in (None, before.name)

        await eventually(moved, timeout=FORMED, interval=0.1)

    async def in_step(self, broker: Broker, streams: Sequence[str]) -> None:
        """Wait until all replicas of the streams are current."""

        async def current() -> bool:
            for stream in streams:
                state = await _cluster_of(broker, stream)
                peers = state.get("replicas", [])
                if not state.get("leader") or len(peers) != SIZE - 1:
                    return False
                if not all(peer.get("current") and not peer.get("offline") for peer in peers):
                    return False
            return True

        await eventually(current, timeout=FORMED, interval=0.1)

    async def whole(self) -> None:
        """Start all servers that do not run, and wait until every server takes part and knows the leader."""
        self.start()
        for node in self.nodes:
            deadline = time.monotonic() + FORMED
            while not await _works(node):
                assert time.monotonic() < deadline, f"{node.name} does not join: {node.log.read_text()[-2000:]}"
                await asyncio.sleep(0.1)


def _config(index: int, folder: Path, port: int, routes: Sequence[int], extra: str) -> str:
    others = ", ".join(f'"nats-route://127.0.0.1:{route}"' for route in routes)
    return (
        f"server_name: n{index}\n"
        f'listen: "127.0.0.1:{port}"\n'
        f"jetstream {{ store_dir: {json.dumps(str(folder / f'n{index}'))} }}\n"
        f'cluster {{ name: test, listen: "127.0.0.1:{routes[index]}", routes: [{others}], connect_retries: 1000 }}\n'
        f"{extra}\n"
    )


async def _cluster_of(broker: Broker, stream: str) -> dict[str, Any]:
    try:
        data = await broker.request(f"$JS.API.STREAM.INFO.{stream}", timeout=2)
    except BrokerUnavailable:
        return {}
    state: dict[str, Any] = msgspec.json.decode(data or b"{}").get("cluster") or {}
    return state


async def _works(node: Node) -> bool:
    """Return whether JetStream answers through this server with all servers present."""
    try:
        async with Broker.connect(node.url, "test-cluster", wait=2) as broker:
            # Only a cluster with all its servers can place three replicas.
            await broker.js.add_stream(name="PROBE", subjects=["probe"], num_replicas=SIZE)
            await broker.js.delete_stream("PROBE")
            return True
    except (BrokerUnavailable, nats.errors.Error, js_errors.Error, OSError, TimeoutError):
        return False


@pytest.fixture(scope="session")
def cluster_servers() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="tailrace-cluster-"))
    servers = Cluster(folder)
    yield servers
    servers.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def cluster(cluster_servers: Cluster) -> AsyncIterator[Cluster]:
    """A whole, empty cluster."""
    await cluster_servers.whole()
    async with Broker.connect(cluster_servers.url, "test-cluster") as broker:
        await empty(broker)
    yield cluster_servers
    for node in cluster_servers.nodes:
        node.resume()
