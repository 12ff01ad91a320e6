"""The processes of a run: a broker of one or three nodes, two of each service, the provider, and links between them."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Self

from bench.chaos.credentials import Credentials
from bench.chaos.history import AnyRecord, Exited, Memory
from bench.chaos.money import PRICES
from bench.chaos.pace import slow_for
from bench.chaos.proxy import Link
from bench.chaos.schedule import DELIVERIES, LEASE, NODES, ROLLED, SERVICES
from bench.processes import STOP_SECONDS, Died, Process, fetch, free_port, python
from services.standalone.embedded import find_nats_server, render_config, render_node

__all__ = ["MEMORY_BOUND", "PARTITIONS", "Member", "Stage", "clean_environment"]

MEMORY_BOUND: Final = {"node": 400 << 20, "producer": 250 << 20, "delivery": 250 << 20, "billing": 300 << 20}
READY_SECONDS: Final = 60.0
ROLLED_SECONDS: Final = 20.0
PARTITIONS: Final = 2
LIFETIME: Final = 10.0
_SETTINGS: Final = {
    "TAILRACE_LEASE": f"{LEASE:g}",
    "TAILRACE_PARTITIONS": str(PARTITIONS),
    "TAILRACE_MAX_DELIVER": "10",
    "TAILRACE_LOG_LEVEL": "info",
    "TAILRACE_LOG_FORMAT": "json",
    "TAILRACE_PRODUCER_ACK_TIMEOUT": "1",
    "TAILRACE_PRODUCER_APPEND_TIMEOUT": "15",
    "TAILRACE_PRODUCER_DRAIN": "1.5",
    "TAILRACE_DELIVERY_FEED_BYTES": "65536",
    "TAILRACE_DELIVERY_LINGER": "1",
    "TAILRACE_DELIVERY_HEARTBEAT": "1",
    "TAILRACE_DELIVERY_DRAIN": "2",
    "TAILRACE_DELIVERY_STALL": "2",
    "TAILRACE_BILLING_INTERVAL": "0.3",
    "TAILRACE_BILLING_HOLD": "2",
    "TAILRACE_BILLING_GRACE": "1",
}


class Member:
    """One process of the system. While ``wanted``, it is restarted when it ends by itself."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self.process: Process | None = None
        self.wanted = True
        self.paused = False
        self.peak = 0
        self._command = command
        self._env = dict(env)
        self._folder = folder
        self._started = 0.0
        self._stopping = False

    def start(self) -> None:
        """Start it, unless it runs or is being stopped; its output is appended to the same file."""
        if self._stopping:
            return
        self.wanted = True
        if self.process is not None and self.process.code is None:
            return
        self._started = time.monotonic()
        self.process = Process(self.name, self._command, self._folder, self._env)

    def pause(self) -> None:
        """Send SIGSTOP, unless it is being stopped: it could not end in time."""
        if self.process is not None and self.process.code is None and not self._stopping:
            self.paused = True
            os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT if it is paused."""
        if self.paused and self.process is not None:
            self.paused = False
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Send SIGKILL; it is not restarted before `start`."""
        self.wanted = self.paused = self._stopping = False
        if self.process is not None:
            self.look()
            self.process.stop(signal.SIGKILL)

    async def stop(self) -> Exited | None:
        """Send SIGTERM; return how it ended, or ``None`` if it had ended before or was killed meanwhile."""
        self.wanted = False
        process = self.process
        if process is None or process.code is not None or self._stopping:
            return None
        self._stopping = True
        self.resume()
        self.look()
        begun, age = time.monotonic(), time.monotonic() - self._started
        await asyncio.to_thread(process.stop, seconds=slow_for(STOP_SECONDS))
        took = time.monotonic() - begun
        if not self._stopping:
            return None
        self._stopping = False
        return Exited(process=self.name, code=process.code or 0, asked=True, seconds=took, age=age)

    def look(self) -> None:
        """Record its peak memory."""
        if self.process is not None and self.process.code is None:
            with contextlib.suppress(Exception):  # the process may end at any time
                self.peak = max(self.peak, self.process.spent().peak)


class Stage:
    """All processes of a run; leaving the context stops them.

    ``planted``: name of a bug that the services are started with. ``credentials``: required by the services.
    """

    def __init__(self, folder: Path, nodes: int, credentials: Credentials, planted: str = "") -> None:
        self.folder = folder
        self._credentials = credentials
        count = 2 * nodes + 1 + len(SERVICES) * (nodes + 1) + len(DELIVERIES)
        first = free_port(count)
        ports = list(range(first, first + count))
        self.node_ports = [ports.pop() for _ in range(nodes)]
        self.routes = [ports.pop() for _ in range(nodes)]
        self.provider_port = ports.pop()
        self.database = folder / "billing.db"
        self.sent = folder / "sent.jsonl"
        self.links = {name: [Link(ports.pop(), upstream) for upstream in self.node_ports] for name in SERVICES}
        self.ports = {name: ports.pop() for name in SERVICES}
        self.call_ports = {name: ports.pop() for name in DELIVERIES}
        self.members = {m.name: m for m in [*self._nodes(), *(self._service(name, planted) for name in SERVICES)]}
        command = python("bench.chaos.provider", "--port", str(self.provider_port), "--record", str(self.sent))
        self.provider = Member("provider", command, clean_environment(), folder)

    @property
    def nats_url(self) -> str:
        """Return the addresses of the nodes themselves, without the links."""
        return ",".join(f"nats://127.0.0.1:{port}" for port in self.node_ports)

    @property
    def nodes(self) -> list[Member]:
        """Return the broker's processes."""
        return [m for m in self.members.values() if m.name.startswith("node-")]

    def _nodes(self) -> list[Member]:
        binary = str(find_nats_server().path)
        found = []
        for index, port in enumerate(self.node_ports):
            name, store = f"node-{index}", self.folder / f"node-{index}"
            config = self.folder / f"{name}.conf"
            alone = len(self.node_ports) == 1
            config.write_text(render_config(port, store) if alone else render_node(index + 1, port, store, self.routes))
            # Nodes do not advertise each other, or services would bypass the links.
            command = [binary, "-c", str(config), *([] if alone else ["--no_advertise=true"])]
            found.append(Member(name, command, clean_environment(), self.folder))
        return found

    def _service(self, name: str, planted: str) -> Member:
        module = f"services.{name.partition('-')[0]}"
        config = self.folder / "tailrace.toml"
        base = f"http://127.0.0.1:{self.provider_port}/v1"
        config.write_text(f'[providers.chaos]\ndialect = "openai"\nbase_url = "{base}"\n')
        prices = self.folder / "prices.csv"
        prices.write_text(PRICES)
        env = _SETTINGS | {
            "TAILRACE_NATS_URL": ",".join(f"nats://127.0.0.1:{link.port}" for link in self.links[name]),
            "TAILRACE_REPLICAS": str(len(self.node_ports)),
            "TAILRACE_CONFIG": str(config),
            "TAILRACE_BILLING_DATABASE_URL": f"sqlite:///{self.database}",
            "TAILRACE_BILLING_PRICES": str(prices),
            f"TAILRACE_{name.partition('-')[0].upper()}_PORT": str(self.ports[name]),
            "TAILRACE_DELIVERY_LIFETIME": f"{slow_for(LIFETIME):g}",
        }
        if name in DELIVERIES:
            env["TAILRACE_DELIVERY_GRPC_PORT"] = str(self.call_ports[name])
        env |= self._credentials.settings()
        command = python("bench.chaos.planted", planted, module) if planted else python(module)
        return Member(name, command, clean_environment() | env, self.folder)

    async def __aenter__(self) -> Self:
        try:
            self.provider.start()
            for node in self.nodes:
                node.start()
            for links in self.links.values():
                for link in links:
                    await link.open()
            for name in SERVICES:
                self.members[name].start()
            await self._until_ready()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + slow_for(READY_SECONDS)
        for name in SERVICES:
            while not await self.is_ready(name):
                process = self.members[name].process
                if time.monotonic() > deadline or (process is not None and process.code is not None):
                    raise Died(f"{name} does not get ready: {process.ending() if process else ''}")
                await asyncio.sleep(0.1)

    async def roll(self, name: str) -> list[Exited]:
        """Restart every process of a target, one after the other; return their exits (see `Member.stop`)."""
        found = []
        for member in self.targets(name):
            await self._all_ready(name)
            if (exited := await member.stop()) is not None:
                found.append(exited)
            member.start()
        return found

    async def _all_ready(self, name: str) -> None:
        """Wait, up to a time limit, until all processes of a target are ready."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(slow_for(ROLLED_SECONDS)):
                for member in self.targets(name):
                    while not await self.is_ready(member.name):  # noqa: ASYNC110  # a process of its own
                        await asyncio.sleep(0.1)

    async def is_ready(self, name: str) -> bool:
        """Return whether a service reports that it is ready."""
        return await asyncio.to_thread(fetch, f"http://127.0.0.1:{self.ports[name]}/readyz", timeout=2) is not None

    async def __aexit__(self, *_: object) -> None:
        for member in [self.provider, *self.members.values()]:
            member.kill()
        for links in self.links.values():
            for link in links:
                await link.close()

    async def watch(self, add: Callable[[AnyRecord], None]) -> None:
        """Restart processes that end by themselves, as a supervisor does, and record memory; run until cancelled."""
        while True:
            await asyncio.sleep(0.5)
            for member in self.members.values():
                member.look()
                process = member.process
                if member.wanted and process is not None and process.code is not None:
                    add(Exited(process=member.name, code=process.code, asked=False, output=process.ending(5)))
                    member.start()

    async def stop(self) -> list[AnyRecord]:
        """Stop services, then nodes, by SIGTERM; return their exits and peak memory."""
        services = await asyncio.gather(*(self.members[name].stop() for name in SERVICES))
        await asyncio.gather(*(node.stop() for node in self.nodes))
        peaks = [Memory(process=m.name, peak=m.peak) for m in self.members.values()]
        return [*(e for e in services if e is not None), *peaks]

    def targets(self, name: str) -> list[Member]:
        """Return the processes of a fault's target."""
        every = {NODES: self.nodes, ROLLED: [self.members[delivery] for delivery in DELIVERIES]}
        return every.get(name) or [self.members[name]]


def clean_environment() -> dict[str, str]:
    """Return this process's environment without settings of services, and with its module path."""
    drop = ("TAILRACE_", "OPENAI_", "ANTHROPIC_", "CO_API", "OPENROUTER_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    return kept | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
