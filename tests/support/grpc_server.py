"""Delivery over gRPC inside the test's own event loop, on a real broker and a real port, with real clients of it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from services.delivery.app import Replica
from services.delivery.grpc.server import serving_grpc
from services.delivery.grpc.service import DeliveryService
from services.delivery.settings import Settings
from services.kit.auth.principal import Principal
from services.kit.clock import SystemClock
from services.kit.jetstream.broker import Broker
from services.kit.settings import Shared
from tests.support.delivery_server import TENANT

PATH = "/tailrace.v1.Delivery/"


class Client:
    """Calls the service over one channel, as a generated stub does."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.read = channel.unary_stream(PATH + "Read", pb.ReadRequest.SerializeToString, pb.ReadResponse.FromString)
        self.attach = channel.stream_stream(
            PATH + "Attach", pb.AttachRequest.SerializeToString, pb.AttachResponse.FromString
        )
        self.consume = channel.stream_stream(
            PATH + "Consume", pb.ConsumeRequest.SerializeToString, pb.ConsumeResponse.FromString
        )
        self.start = self._unary("Start", pb.StartRequest, pb.StartResponse)
        self.cancel = self._unary("Cancel", pb.CancelRequest, pb.CancelResponse)
        self.generation = self._unary("GetGeneration", pb.GetGenerationRequest, pb.Generation)

    def _unary(self, name: str, request: Any, answer: Any) -> Any:
        return self.channel.unary_unary(PATH + name, request.SerializeToString, answer.FromString)


class GrpcStage:
    """A running server. ``refuse`` checks the credentials, where a test sets it."""

    def __init__(self, replica: Replica, broker: Broker, delivery: DeliveryService, port: int) -> None:
        self.replica = replica
        self.broker = broker
        self.delivery = delivery
        self.port = port
        self.target = f"127.0.0.1:{port}"

    @asynccontextmanager
    async def client(self, *options: tuple[str, Any]) -> AsyncIterator[Client]:
        async with grpc.aio.insecure_channel(self.target, options=options) as channel:
            yield Client(channel)


async def anybody(_authorization: str | None) -> Principal:
    return Principal(tenant=TENANT)


@asynccontextmanager
async def serving_calls(
    url: str, *, settings: Settings | None = None, authenticate: Any = anybody, **options: Any
) -> AsyncIterator[GrpcStage]:
    """Run delivery over gRPC against the broker at ``url`` while the block runs."""
    shared = Shared(nats_url=url)
    async with Broker.connect(url, "test-delivery") as broker:
        await broker.apply(shared.topology())
        replica = Replica(broker, SystemClock(), shared, settings or Settings())
        delivery = DeliveryService(
            replica.supervisor, replica.streams, replica.lookups, replica.intake, replica.consumers, authenticate
        )

        async with serving_grpc(delivery, "127.0.0.1", 0, **{"grace": lambda: 2.0} | options) as port:
            sweeper = asyncio.create_task(replica.run())
            try:
                yield GrpcStage(replica, broker, delivery, port)
            finally:
                sweeper.cancel()
                await asyncio.gather(sweeper, return_exceptions=True)
                await replica.drain(1)


class Read:
    """The messages of one `Read` call: events as (generation, seq), their cursors, and control messages."""

    def __init__(self) -> None:
        self.events: list[pb.Event] = []
        self.gaps: list[pb.Gap] = []
        self.byes: list[pb.Bye] = []

    @property
    def keys(self) -> list[tuple[str, int]]:
        return [(event.generation, event.seq) for event in self.events]

    @property
    def cursors(self) -> list[str]:
        return [event.cursor for event in self.events]

    def take(self, response: pb.ReadResponse) -> None:
        for frame in response.frames:
            match frame.WhichOneof("kind"):
                case "event":
                    self.events.append(frame.event)
                case "gap":
                    self.gaps.append(frame.gap)
                case "bye":
                    self.byes.append(frame.bye)

    async def of(self, call: Any, count: int | None = None) -> "Read":
        """Read a call until so many events are there in all, or to its end."""
        while count is None or len(self.events) < count:
            response = await asyncio.wait_for(call.read(), 15)
            if response is grpc.aio.EOF:
                break
            self.take(response)
        return self


class Attached:
    """One call of `Attach`: the messages of each id, and those without an id."""

    def __init__(self, client: Client, **options: Any) -> None:
        self.call = client.attach(**options)
        self.reads: dict[str, Read] = {}
        self.said: dict[str, list[tuple[str, Any]]] = {}

    async def say(self, id_: str, **kind: Any) -> None:
        await self.call.write(pb.AttachRequest(id=id_, **kind))

    async def subscribe(self, id_: str, session: str = "s", **subscribe: Any) -> None:
        read = pb.ReadRequest(session=session, begin=pb.BEGIN_START)
        await self.say(id_, subscribe=pb.Subscribe(**({"read": read} | subscribe)))

    async def until(self, enough: Callable[[], object]) -> None:
        while not enough():
            response = await asyncio.wait_for(self.call.read(), 15)
            assert response is not grpc.aio.EOF, self.said
            self.take(response)

    async def to_the_end(self) -> None:
        while (response := await asyncio.wait_for(self.call.read(), 15)) is not grpc.aio.EOF:
            self.take(response)

    def take(self, response: pb.AttachResponse) -> None:
        for item in response.items:
            kind = item.WhichOneof("kind")
            assert kind is not None
            if kind == "read":
                self.reads.setdefault(item.id, Read()).take(item.read)
            else:
                self.said.setdefault(item.id, []).append((kind, getattr(item, kind)))

    def count(self, id_: str) -> int:
        return len(self.reads[id_].events) if id_ in self.reads else 0

    def kinds(self, id_: str) -> list[str]:
        return [kind for kind, _ in self.said.get(id_, [])]

    def last(self, id_: str) -> Any:
        return self.said[id_][-1][1]
