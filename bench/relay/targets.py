"""Targets of a measurement: the provider itself, the pipeline, a peer. Each starts its processes."""

import asyncio
import sys
from pathlib import Path
from typing import Final, Protocol

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from bench.processes import Died, Processes, fetch, free_port, python
from schemas.topology import billing_durable, token_stream
from services.kit.jetstream.broker import Broker, BrokerUnavailable

__all__ = ["Direct", "Endpoint", "Producer", "Tailrace", "Target"]

READY_SECONDS: Final = 40.0


class Endpoint(msgspec.Struct, frozen=True):
    """The clients' address.

    ``kind``: ``openai`` (the response is the stream), ``tailrace`` (request, then subscribe), or ``log`` (request
    through the work queue, and read the log at the end).
    """

    kind: str
    port: int
    model: str
    headers: dict[str, str] = {}


class Target(Protocol):
    """A system to measure."""

    @property
    def name(self) -> str:
        """Return its name in the report."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of its processes."""
        ...

    def start(self, processes: Processes, provider: int) -> Endpoint:
        """Start its processes in front of the provider's port; return the clients' address once they are ready."""
        ...

    def settled(self) -> bool | None:
        """Return whether the work after the clients' end is done too, or ``None`` if there is none."""
        ...


class Direct:
    """Clients connected to the provider itself: the baseline."""

    name: Final = "direct"
    parts: Final[tuple[str, ...]] = ()

    def start(self, processes: Processes, provider: int) -> Endpoint:
        """Start nothing."""
        return Endpoint("openai", provider, "bench")

    def settled(self) -> bool | None:
        """Return ``None``: no work remains after the clients' end."""
        return None


class Tailrace:
    """The whole pipeline with its defaults: nats-server with file storage, producer, delivery, billing on SQLite."""

    name: Final = "tailrace"
    parts: Final[tuple[str, ...]] = ("nats-server", "producer", "delivery", "billing")

    def __init__(self) -> None:
        self._nats = ""
        self._ports: list[int] = []

    def start(self, processes: Processes, provider: int) -> Endpoint:
        """Start the broker and the three services."""
        ports = start_services(processes, provider, self.parts)
        self._ports = [ports["delivery"], ports["producer"]]
        self._nats = f"nats://127.0.0.1:{ports['nats-server']}"
        return Endpoint("tailrace", ports["delivery"], "bench/bench")

    def stages(self) -> dict[str, tuple[float, int]]:
        """Return for each stage of a start its seconds and how often it was measured, from the services' metrics."""
        found: dict[str, tuple[float, int]] = {}
        for port in self._ports:
            body = fetch(f"http://127.0.0.1:{port}/metrics") or b""
            for family in text_string_to_metric_families(body.decode()):
                if family.name != "tailrace_first_token_stage_seconds":
                    continue
                sums = {s.labels["stage"]: s.value for s in family.samples if s.name.endswith("_sum")}
                counts = {s.labels["stage"]: int(s.value) for s in family.samples if s.name.endswith("_count")}
                found |= {name: (sums[name], count) for name, count in counts.items() if count}
        return found

    def settled(self) -> bool | None:
        """Return whether billing has booked all events of the log."""
        try:
            return asyncio.run(_pending(self._nats)) == 0
        except BrokerUnavailable as error:
            raise Died(str(error)) from error


class Producer:
    """One producer and a nats-server with file storage, without readers."""

    name: Final = "producer"
    parts: Final[tuple[str, ...]] = ("nats-server", "producer")

    def start(self, processes: Processes, provider: int) -> Endpoint:
        """Start broker and producer; the clients use the broker."""
        ports = start_services(processes, provider, self.parts)
        return Endpoint("log", ports["nats-server"], "bench/bench")

    def settled(self) -> bool | None:
        """Return ``None``: the clients wait until all events are stored."""
        return None


def start_services(processes: Processes, provider: int, parts: tuple[str, ...]) -> dict[str, int]:
    """Start the broker, which is ``parts[0]``, and the services; return their ports once all are ready."""
    folder = processes.folder
    ports = {name: free_port() for name in parts}
    start_nats(processes, ports["nats-server"])
    config = folder / "tailrace.toml"
    config.write_text(f'[providers.bench]\ndialect = "openai"\nbase_url = "http://127.0.0.1:{provider}/v1"\n')
    env = {
        "TAILRACE_NATS_URL": f"nats://127.0.0.1:{ports['nats-server']}",
        "TAILRACE_CONFIG": str(config),
        "TAILRACE_LOG_LEVEL": "warning",
        "TAILRACE_PRODUCER_FIRST_TOKEN": "300",  # the provider holds all streams until the last one is open
        "TAILRACE_BILLING_DATABASE_URL": f"sqlite+aiosqlite:///{folder / 'billing.db'}",
        **{f"TAILRACE_{name.upper()}_PORT": str(ports[name]) for name in parts[1:]},
    }
    for name in parts[1:]:
        processes.start(name, python(f"services.{name}"), env)
    for name in parts[1:]:
        url = f"http://127.0.0.1:{ports[name]}/readyz"
        processes.wait(lambda url=url: fetch(url) is not None, READY_SECONDS, f"{name} ready")  # type: ignore[misc]
    return ports


def start_nats(processes: Processes, port: int) -> None:
    """Start the embedded nats-server with an empty store, and wait until it is ready."""
    binary = Path(sys.executable).with_name("nats-server")
    store = processes.folder / "nats"
    command = [
        str(binary) if binary.exists() else "nats-server",
        "-a",
        "127.0.0.1",
        "-p",
        str(port),
        "-js",
        "-sd",
        str(store),
    ]
    processes.start("nats-server", command)

    def greets() -> bool:
        return asyncio.run(_greets(port))

    processes.wait(greets, READY_SECONDS, "nats-server ready")


async def _greets(port: int) -> bool:
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                return (await reader.readline()).startswith(b"INFO ")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


class _Pending(msgspec.Struct):
    num_pending: int
    num_ack_pending: int


async def _pending(url: str) -> int:
    async with Broker.connect(url, "bench", wait=5) as broker:
        answer = await broker.request(f"$JS.API.CONSUMER.INFO.{token_stream(0)}.{billing_durable(0)}")
    try:
        info = msgspec.json.decode(answer or b"", type=_Pending)
    except msgspec.DecodeError as error:
        raise BrokerUnavailable(f"no durable consumer of billing: {answer!r}") from error
    return info.num_pending + info.num_ack_pending
