"""A delivery service inside the test's own event loop, on a real broker and a real port; and a log to write into."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from prometheus_client import REGISTRY

from bench.processes import free_port
from schemas.codec import encode_event
from schemas.events import AnyEvent, Completed, Delta, Started, UsageReported
from schemas.requests import ENVELOPE
from schemas.subjects import Address, token_subject
from schemas.topology import Topology
from schemas.usage import Usage
from services.delivery.app import Replica, build_app
from services.delivery.reports.counting import DeliveryCounts
from services.delivery.reports.reporter import DeliveryReporter
from services.delivery.settings import Settings
from services.kit.auth.config import build_authenticator
from services.kit.clock import SystemClock
from services.kit.http import serving
from services.kit.jetstream.broker import Broker
from services.kit.settings import Shared
from tests.conftest import eventually
from tests.support.sse_client import SseClient

TENANT = "default"
SILENCE = 20.0  # seconds without a byte after which a test fails: a cluster that was down elects leaders first


class Stage:
    """A running delivery and a client of it."""

    def __init__(
        self,
        url: str,
        replica: Replica,
        broker: Broker,
        http: httpx.AsyncClient,
        counts: DeliveryReporter | None = None,
    ) -> None:
        self.url = url
        self.replica = replica
        self.broker = broker
        self.http = http
        self.counts = counts

    def events(self, session: str = "s", **query: str) -> SseClient:
        """Return a client of a session's events that has not connected yet."""
        return SseClient(self.http, f"{self.url}/v1/sessions/{session}/events", **query)

    async def settled(self) -> None:
        """Wait until no client is connected and all their resources are released."""
        await eventually(
            lambda: subscribers() == 0 and not any(f.subscribers for f in self.replica.feeds._feeds.values())
        )


@asynccontextmanager
async def delivering(
    url: str,
    *,
    shared: Shared | None = None,
    counts: Callable[[Broker], DeliveryReporter] | None = None,
    **settings: Any,
) -> AsyncIterator[Stage]:
    """Run delivery against the broker at ``url`` while the block runs; ``counts`` creates its counter."""
    shared = shared or Shared(nats_url=url)
    own = Settings(**({"port": free_port(), "console": False} | settings))
    async with Broker.connect(url, "test-delivery") as broker:
        await broker.apply(shared.topology())
        reporter = None if counts is None else counts(broker)
        sums = None if reporter is None else DeliveryCounts(reporter)
        replica = Replica(broker, SystemClock(), shared, own, sums)
        authenticator = build_authenticator(shared, own.host, broker, replica.clock)
        async with (
            authenticator.running(),
            serving(
                build_app(replica, authenticator),
                own.host,
                own.port,
                grace=lambda: 2,
                message_bytes=own.max_body + ENVELOPE,
            ),
            httpx.AsyncClient(timeout=SILENCE) as http,
        ):
            sweeper = asyncio.create_task(replica.run())
            try:
                yield Stage(f"http://{own.host}:{own.port}", replica, broker, http, reporter)
            finally:
                sweeper.cancel()
                await asyncio.gather(sweeper, return_exceptions=True)
                await replica.drain(1)


def story(generation: str, deltas: int = 10, *, size: int = 0) -> list[AnyEvent]:
    """Return a whole generation: started, deltas (padded to ``size`` characters), usage, completed."""
    events: list[AnyEvent] = [
        Started(generation=generation, seq=0, model="m", provider="scripted", upstream_model="story")
    ]
    events += [
        Delta(generation=generation, seq=n, text=f"{generation}:{n} ".ljust(size), tokens=n)
        for n in range(1, deltas + 1)
    ]
    events.append(UsageReported(generation=generation, seq=deltas + 1, usage=Usage(input=3, output=deltas)))
    events.append(Completed(generation=generation, seq=deltas + 2, finish_reason="stop"))
    return events


def interleaved(rng: random.Random, *runs: list[AnyEvent]) -> list[AnyEvent]:
    """Return the events of several generations in one order, each generation in its own."""
    queues = [list(run) for run in runs]
    merged = []
    while queue := rng.choice([q for q in queues if q] or [[]]):
        merged.append(queue.pop(0))
    return merged


class Log:
    """Appends events to a session's log as a producer does."""

    def __init__(self, broker: Broker, session: str = "s", topology: Topology | None = None) -> None:
        self._broker = broker
        self.session = session
        self._partitions = (topology or Topology()).partitions

    async def append(self, *events: AnyEvent, pause: float = 0.0) -> list[int]:
        """Store events one after another and return their stream sequences."""
        stored = []
        for event in events:
            stored.append(await self._broker.publish_stored(self.subject(event.generation), encode_event(event)))
            if pause:
                await asyncio.sleep(pause)
        return stored

    async def append_bytes(self, generation: str, data: bytes) -> int:
        """Store any bytes under a generation's subject."""
        return await self._broker.publish_stored(self.subject(generation), data)

    def subject(self, generation: str) -> str:
        """Return the subject of a generation."""
        return token_subject(Address.of(TENANT, self.session, generation, self._partitions))


def keys(events: Iterable[Any]) -> list[tuple[str, int]]:
    """Return generation and seq of events, as structs or as decoded JSON."""
    return [(e["generation"], e["seq"]) if isinstance(e, dict) else (e.generation, e.seq) for e in events]


def metric(name: str, **labels: str) -> float:
    """Return the present value of a metric."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def subscribers() -> float:
    """Return how many subscribers are connected."""
    return metric("tailrace_delivery_subscribers", transport="sse")
