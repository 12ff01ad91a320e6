"""Durable consumers over gRPC, beside HTTP and WebSocket, on a real broker with real clients."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from services.kit.auth.principal import Principal
from services.kit.jetstream.broker import Broker
from tests.conftest import eventually
from tests.support.consumer_server import Service, Stage, consuming, seqs
from tests.support.delivery_server import TENANT, Log, keys, metric, story
from tests.support.grpc_server import Client, GrpcStage, serving_calls
from tests.support.websocket_client import socket


class Consumed:
    """One call of `Consume` and the messages it received."""

    def __init__(self, client: Client, consumer: str = "svc", **wish: Any) -> None:
        self.call = client.consume()
        self.opening = pb.OpenConsumer(consumer=consumer, **wish)
        self.events: list[pb.ConsumerEvent] = []

    async def opened(self) -> "Consumed":
        await self.call.write(pb.ConsumeRequest(open=self.opening))
        await self.hear("consuming")
        return self

    async def hear(self, kind: str) -> Any:
        """Read to the next answer of a kind; events on the way are kept."""
        while True:
            response = await asyncio.wait_for(self.call.read(), 15)
            assert response is not grpc.aio.EOF, kind
            found = response.WhichOneof("kind")
            if found == "deliveries":
                self.events += response.deliveries.events
            if found == kind:
                return getattr(response, kind)

    async def given(self, count: int) -> list[pb.ConsumerEvent]:
        while len(self.events) < count:
            await self.hear("deliveries")
        return self.events

    async def settle(self, **words: Any) -> pb.Settled:
        await self.call.write(pb.ConsumeRequest(settle=pb.Settle(id="1", **words)))
        return await self.hear("settled")

    async def ack(self, events: list[pb.ConsumerEvent]) -> None:
        settled = await self.settle(acks=[event.token for event in events])
        assert settled == pb.Settled(id="1", settled=len(events))

    @property
    def keys(self) -> list[tuple[str, int]]:
        return [(each.event.generation, each.event.seq) for each in self.events]


@pytest.fixture
async def stage(nats_url: str, broker: Broker) -> AsyncIterator[Stage]:
    async with consuming(nats_url) as running:
        yield running


@pytest.fixture
async def calls(nats_url: str, stage: Stage) -> AsyncIterator[GrpcStage]:
    async def caller(_authorization: str | None) -> Principal:
        assert stage.principal is not None
        return stage.principal

    async with serving_calls(nats_url, authenticate=caller) as running:
        yield running
        await eventually(lambda: metric("tailrace_delivery_consumer_sessions") == 0)


@pytest.fixture
async def client(calls: GrpcStage) -> AsyncIterator[Client]:
    async with calls.client() as one:
        yield one


@pytest.fixture
def log(broker: Broker) -> Log:
    return Log(broker)


async def test_events_are_delivered_and_acknowledged_over_one_call(stage: Stage, client: Client, log: Log) -> None:
    service = await Service(stage).created()
    await log.append(*story("g1", 5))
    call = await Consumed(client).opened()
    events = await call.given(len(story("g1", 5)))
    assert call.keys == keys(story("g1", 5))
    assert {(e.session, e.deliveries, e.gap) for e in events} == {("s", 1, "")}
    assert all(e.event.cursor for e in events)
    await call.ack(events)
    assert (await service.view())["in_flight"] == 0
    await call.call.write(pb.ConsumeRequest(stop=pb.StopConsuming()))
    assert (await call.hear("stopped")).reason == "unconsumed"
    assert await call.call.code() == grpc.StatusCode.OK


async def test_with_automatic_acknowledgement_nothing_stays_in_flight(stage: Stage, client: Client, log: Log) -> None:
    service = await Service(stage).created()
    await log.append(*story("g1", 5))
    call = await Consumed(client, auto_ack=True).opened()
    await call.call.done_writing()  # a client that has nothing to say goes on reading
    assert not any(event.token for event in await call.given(8))
    async with asyncio.timeout(10):
        while (await service.view())["in_flight"]:
            await asyncio.sleep(0.05)
    call.call.cancel()


async def test_no_more_events_than_the_window_are_delivered_until_settlement_or_credit(
    stage: Stage, client: Client, log: Log
) -> None:
    service = await Service(stage).created()
    await log.append(*story("g1", 20))
    call = await Consumed(client, window=4).opened()
    await call.given(4)
    assert (await service.view())["in_flight"] == 4
    await call.ack(call.events[:3])
    await call.given(7)
    await call.call.write(pb.ConsumeRequest(credit=pb.ConsumerCredit(events=2)))
    await call.given(9)
    assert (await call.settle()).settled == 0  # whatever had been sent has come
    assert call.keys == keys(story("g1", 20))[:9]
    call.call.cancel()


async def test_a_nacked_event_is_redelivered(stage: Stage, client: Client, log: Log) -> None:
    await Service(stage).created(ack_wait=60)
    await log.append(*story("g1", 0)[:1])
    call = await Consumed(client).opened()
    (event,) = await call.given(1)
    await call.settle(nacks=[event.token])
    assert [e.deliveries for e in await call.given(2)] == [1, 2]
    call.call.cancel()


async def test_grpc_websocket_and_http_share_the_work(stage: Stage, client: Client, log: Log) -> None:
    service = await Service(stage).created(ack_wait=60)
    await log.append(*story("g1", 30))
    call = await Consumed(client, window=10).opened()
    await call.given(10)
    async with socket(stage.url) as other:
        await other.say("consume", consumer="svc", credit={"events": 10})
        over_socket = []
        while len(over_socket) < 10:
            over_socket += (await other.hear("deliveries"))["events"]
        over_http = await service.take(13)
        tokens = [event["token"] for event in over_socket]
        assert (await call.settle(acks=tokens)).settled == 10  # tokens are good over any connection
    await call.ack(call.events)
    assert sorted(call.keys + seqs(over_socket) + seqs(over_http)) == sorted(keys(story("g1", 30)))
    assert (await service.view())["in_flight"] == 0
    call.call.cancel()


async def test_unacknowledged_events_of_a_dead_client_are_delivered_over_websocket(
    stage: Stage, calls: GrpcStage, log: Log
) -> None:
    await Service(stage).created(ack_wait=1)
    await log.append(*story("g1", 10))
    async with calls.client() as dying:
        call = await Consumed(dying, window=6).opened()
        await call.given(6)
        await call.ack(call.events[:2])
        kept = call.keys[:2]
    async with socket(stage.url) as other:
        await other.say("consume", consumer="svc", ack="auto")
        taken = []
        while len(taken) < 11:
            taken += (await other.hear("deliveries"))["events"]
    assert sorted(kept + seqs(taken)) == sorted(keys(story("g1", 10)))


async def test_a_deleted_consumer_ends_the_call(stage: Stage, client: Client) -> None:
    service = await Service(stage).created()
    call = await Consumed(client).opened()
    await stage.http.delete(service.path)
    assert (await call.hear("stopped")).reason == "deleted"


async def test_a_drain_ends_all_calls_including_those_without_a_request(
    stage: Stage, calls: GrpcStage, client: Client
) -> None:
    await Service(stage).created()
    call, silent = await Consumed(client).opened(), client.consume()
    await silent.initial_metadata()
    await calls.replica.drain(5)
    assert (await call.hear("stopped")).reason == "drain"
    assert await silent.code() == grpc.StatusCode.UNAVAILABLE


async def refused(client: Client, first: pb.ConsumeRequest) -> Any:
    call = client.consume()
    await call.write(first)
    return await asyncio.wait_for(call.code(), 10)


async def test_missing_permission_and_unknown_consumer_are_refused(stage: Stage, client: Client) -> None:
    await Service(stage).created()
    wish = pb.ConsumeRequest(open=pb.OpenConsumer(consumer="svc"))
    unknown = pb.ConsumeRequest(open=pb.OpenConsumer(consumer="other"))
    assert await refused(client, unknown) == grpc.StatusCode.NOT_FOUND
    assert await refused(client, pb.ConsumeRequest(settle=pb.Settle())) == grpc.StatusCode.INVALID_ARGUMENT
    stage.principal = Principal(tenant=TENANT, scopes=frozenset({"read"}))
    assert await refused(client, wish) == grpc.StatusCode.PERMISSION_DENIED
    stage.principal = Principal(tenant="other")
    assert await refused(client, wish) == grpc.StatusCode.NOT_FOUND


async def test_invalid_requests_are_refused_and_the_call_stays_open(stage: Stage, client: Client) -> None:
    await Service(stage).created()
    call = await Consumed(client).opened()
    for request, status in (
        (pb.ConsumeRequest(settle=pb.Settle(acks=["nonsense"])), 400),
        (pb.ConsumeRequest(settle=pb.Settle(delay=-1)), 400),
        (pb.ConsumeRequest(credit=pb.ConsumerCredit(events=1)), 409),
        (pb.ConsumeRequest(open=call.opening), 409),
        (pb.ConsumeRequest(), 400),
    ):
        await call.call.write(request)
        assert (await call.hear("refused")).problem.status == status, request
    assert (await call.settle()).settled == 0
    call.call.cancel()
