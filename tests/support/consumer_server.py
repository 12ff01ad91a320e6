"""Durable consumers served inside the test's own event loop, and a client of them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from litestar import Litestar, asgi

from bench.processes import free_port
from schemas.topology import Topology
from services.delivery.app import Replica
from services.delivery.consumers.registry import Consumers
from services.delivery.http.consumer_events import ConsumerEvents
from services.delivery.http.consumers import consumers_router
from services.delivery.settings import Settings
from services.delivery.websocket.handler import WebSockets
from services.kit.auth.principal import PRINCIPAL, Principal
from services.kit.clock import SystemClock
from services.kit.http import serving
from services.kit.jetstream.broker import Broker
from services.kit.problem import EXCEPTION_HANDLERS
from services.kit.request_head import BodyLimit
from services.kit.settings import Shared
from tests.support.delivery_server import TENANT


class Stage:
    """A running replica and a client of it. ``principal``: the caller of all requests."""

    def __init__(self, url: str, replica: Replica, http: httpx.AsyncClient) -> None:
        self.url = url
        self.replica = replica
        self.http = http
        self.principal: Principal | None = Principal(tenant=TENANT)

    @property
    def consumers(self) -> Consumers:
        """The replica's durable consumers."""
        return self.replica.consumers


@asynccontextmanager
async def consuming(
    url: str, *, topology: Topology | None = None, heartbeat: float = 15.0, stall: float = 30.0, **limits: Any
) -> AsyncIterator[Stage]:
    """Serve durable consumers from the broker at ``url`` while the block runs."""
    topology = topology or Topology()
    async with Broker.connect(url, "test-consumers") as broker:
        await broker.apply(topology)
        settings = Settings(heartbeat=heartbeat, stall=stall, **limits)
        replica = Replica(broker, SystemClock(), Shared(partitions=topology.partitions), settings)
        consumers, supervisor, clock = replica.consumers, replica.supervisor, replica.clock
        limit = BodyLimit(1_048_576, "max")
        sockets = WebSockets(clock, supervisor, settings, replica.streams, replica.intake, consumers, limit)
        consumer_events = ConsumerEvents(consumers, supervisor, clock, settings)

        @asgi("/v1/ws", copy_scope=False)
        async def websocket(scope: Any, receive: Any, send: Any) -> None:
            await sockets(scope, receive, send)

        litestar = Litestar(
            [consumers_router(consumers, consumer_events), websocket],
            exception_handlers=EXCEPTION_HANDLERS,
            logging_config=None,
            openapi_config=None,
        )
        port = free_port()
        async with httpx.AsyncClient(timeout=15) as http:
            stage = Stage(f"http://127.0.0.1:{port}", replica, http)

            async def app(scope: Any, receive: Any, send: Any) -> None:
                scope[PRINCIPAL] = stage.principal
                await litestar(scope, receive, send)

            async with serving(app, "127.0.0.1", port, grace=lambda: 2):
                supervising = asyncio.create_task(replica.run())
                try:
                    yield stage
                finally:
                    supervising.cancel()
                    await asyncio.gather(supervising, return_exceptions=True)
                    await replica.drain(3)


class Service:
    """A service that reads through the durable consumer ``name`` of a stage."""

    def __init__(self, stage: Stage, name: str = "svc") -> None:
        self.stage = stage
        self.name = name
        self.path = f"{stage.url}/v1/consumers/{name}"

    async def put(self, **wish: Any) -> httpx.Response:
        return await self.stage.http.put(self.path, json=wish)

    async def created(self, **wish: Any) -> "Service":
        """Create the consumer and return this service."""
        answer = await self.put(**wish)
        assert answer.status_code in (200, 201), answer.text
        return self

    async def view(self) -> dict[str, Any]:
        answer = await self.stage.http.get(self.path)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def batch(self, batch: int = 100, wait: float = 0, **query: Any) -> list[dict[str, Any]]:
        params = {"batch": str(batch), "wait": str(wait)} | query
        answer = await self.stage.http.get(f"{self.path}/events", params=params, timeout=wait + 10)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["events"])

    async def settle(self, **words: Any) -> dict[str, Any]:
        answer = await self.stage.http.post(f"{self.path}/acks", json=words)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def ack(self, events: list[dict[str, Any]]) -> None:
        settled = await self.settle(acks=[e["token"] for e in events])
        assert settled == {"settled": len(events), "unknown": []}

    async def take(self, count: int, *, within: float = 20) -> list[dict[str, Any]]:
        """Take and acknowledge events until there are ``count`` of them."""
        taken: list[dict[str, Any]] = []
        async with asyncio.timeout(within):
            while len(taken) < count:
                events = await self.batch(wait=2)
                await self.ack(events)
                taken += events
        return taken

    async def dead(self) -> list[dict[str, Any]]:
        answer = await self.stage.http.get(f"{self.path}/dead")
        assert answer.status_code == 200, answer.text
        return list(answer.json()["events"])

    @asynccontextmanager
    async def stream(self, accept: str = "application/x-ndjson", **query: str) -> AsyncIterator["Lines"]:
        async with self.stage.http.stream(
            "GET", f"{self.path}/events", params=query, headers={"accept": accept}, timeout=30
        ) as response:
            assert response.status_code == 200
            yield Lines(response)


class Lines:
    """The lines of a stream that hold something."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    async def next(self, within: float = 20) -> dict[str, Any]:
        async with asyncio.timeout(within):
            async for line in self._lines:
                text = line.removeprefix("data: ")
                if text.startswith("{") and (said := json.loads(text)) != {"type": "heartbeat"}:
                    return dict(said)
        raise AssertionError("the stream has ended")

    async def some(self, count: int) -> list[dict[str, Any]]:
        return [await self.next() for _ in range(count)]


def seqs(events: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Return generation and seq of given events."""
    return [(e["event"]["generation"], e["event"]["seq"]) for e in events]
