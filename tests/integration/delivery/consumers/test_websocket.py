"""Durable consumers over WebSocket, beside HTTP, on a real broker."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.kit.auth.principal import Principal
from services.kit.jetstream.broker import Broker
from tests.conftest import eventually
from tests.support.consumer_server import Service, Stage, consuming, seqs
from tests.support.delivery_server import TENANT, Log, keys, metric, story
from tests.support.websocket_client import JSON, MSGPACK, SocketClient, socket


@pytest.fixture
async def stage(nats_url: str, broker: Broker) -> AsyncIterator[Stage]:
    async with consuming(nats_url) as running:
        yield running
        await eventually(lambda: metric("tailrace_delivery_consumer_sessions") == 0)


@pytest.fixture
def log(broker: Broker) -> Log:
    return Log(broker)


async def given(client: SocketClient, count: int) -> list[dict[str, Any]]:
    """Hear until so many events have been given."""
    events: list[dict[str, Any]] = []
    while len(events) < count:
        events += (await client.hear("deliveries"))["events"]
    return events


async def ack(client: SocketClient, events: list[dict[str, Any]], consumer: str = "svc") -> None:
    settled = await client.ask("settle", id="a", consumer=consumer, acks=[event["token"] for event in events])
    expected = {"type": "settled", "id": "a", "consumer": consumer, "settled": len(events), "unknown": []}
    assert settled == expected


async def consume(client: SocketClient, consumer: str = "svc", **wish: Any) -> None:
    answer = await client.ask("consume", id="c", consumer=consumer, **wish)
    assert answer == {"type": "consuming", "id": "c", "consumer": consumer}


async def nothing_more(client: SocketClient) -> None:
    """Wait for the reply to a ping, so that all earlier messages have arrived."""
    answer = await client.ask("ping", id="quiet")
    assert answer["type"] == "pong"


@pytest.mark.parametrize("subprotocol", [JSON, MSGPACK])
async def test_events_are_delivered_and_acknowledged_over_one_socket(stage: Stage, log: Log, subprotocol: str) -> None:
    service = await Service(stage).created()
    await log.append(*story("g1", 5))
    async with socket(stage.url, subprotocol) as client:
        await consume(client)
        events = await given(client, len(story("g1", 5)))
        assert seqs(events) == keys(story("g1", 5))
        assert {(e["session"], e["deliveries"]) for e in events} == {("s", 1)}
        assert (await service.view())["in_flight"] == len(events)
        await ack(client, events)
    view = await service.view()
    assert (view["in_flight"], view["pending"]) == (0, 0)


async def test_events_over_websocket_equal_events_over_http(stage: Stage, log: Log) -> None:
    await log.append(*story("g1", 3))
    over_http = await (await Service(stage, "one").created()).batch()
    await Service(stage, "two").created()
    async with socket(stage.url) as client:
        await consume(client, "two")
        over_socket = await given(client, len(over_http))
    assert [e | {"token": ""} for e in over_socket] == [e | {"token": ""} for e in over_http]


async def test_with_automatic_acknowledgement_nothing_stays_in_flight(stage: Stage, log: Log) -> None:
    service = await Service(stage).created()
    await log.append(*story("g1", 5))
    async with socket(stage.url) as client:
        await consume(client, ack="auto")
        events = await given(client, len(story("g1", 5)))
        assert all("token" not in event for event in events)
        async with asyncio.timeout(10):
            while (await service.view())["in_flight"]:
                await asyncio.sleep(0.05)


async def test_no_more_events_than_the_credit_are_delivered_until_settlement_or_more_credit(
    stage: Stage, log: Log
) -> None:
    service = await Service(stage).created()
    await log.append(*story("g1", 20))
    async with socket(stage.url) as client:
        await consume(client, credit={"events": 4})
        first = await given(client, 4)
        await nothing_more(client)
        assert (await service.view())["in_flight"] == 4
        await ack(client, first[:3])
        second = await given(client, 3)
        await client.say("credit", consumer="svc", events=2)
        third = await given(client, 2)
        await nothing_more(client)
        assert seqs(first + second + third) == keys(story("g1", 20))[:9]


async def test_a_consumer_without_credit_continues_when_credit_is_granted(stage: Stage, log: Log) -> None:
    service = await Service(stage).created(ack_wait=1)
    await log.append(*story("g1", 10))
    async with socket(stage.url) as client:
        await consume(client, credit={"events": 2}, ack="auto")
        first = await given(client, 2)
        await eventually(lambda: metric("tailrace_delivery_consumer_sessions") == 0)
        await client.say("credit", consumer="svc", events=100)
        rest = await given(client, 11)
    assert seqs(first + rest) == keys(story("g1", 10))
    assert (await service.view())["pending"] == 0


async def test_a_nacked_event_is_redelivered(stage: Stage, log: Log) -> None:
    await Service(stage).created(ack_wait=60)
    await log.append(*story("g1", 0)[:1])
    async with socket(stage.url) as client:
        await consume(client)
        (event,) = await given(client, 1)
        await client.say("settle", consumer="svc", nacks=[event["token"]])
        (again,) = await given(client, 1)
    assert (seqs([again]), again["deliveries"]) == (seqs([event]), 2)


async def test_a_socket_and_http_share_the_work(stage: Stage, log: Log) -> None:
    service = await Service(stage).created(ack_wait=60)
    await log.append(*story("g1", 30))
    async with socket(stage.url) as client:
        await consume(client, credit={"events": 10})
        over_socket = await given(client, 10)
        over_http = await service.take(23)
        await ack(client, over_socket)
        await nothing_more(client)
    assert sorted(seqs(over_socket + over_http)) == sorted(keys(story("g1", 30)))


async def test_unacknowledged_events_of_a_dead_client_are_delivered_to_another(stage: Stage, log: Log) -> None:
    service = await Service(stage).created(ack_wait=1)
    await log.append(*story("g1", 10))
    async with socket(stage.url) as client:
        await consume(client, credit={"events": 6})
        lost = await given(client, 6)
        await ack(client, lost[:2])
        client.connection.transport.abort()
    taken = await service.take(11)
    assert sorted(seqs(lost[:2] + taken)) == sorted(keys(story("g1", 10)))
    assert {e["deliveries"] for e in taken if seqs([e])[0] in seqs(lost)} == {2}


async def test_events_may_be_settled_over_another_connection(stage: Stage, log: Log) -> None:
    service = await Service(stage).created()
    await log.append(*story("g1", 0))
    async with socket(stage.url) as client:
        await ack(client, await service.batch())
    assert (await service.view())["in_flight"] == 0


async def test_a_consumer_is_read_until_unconsume_or_deletion(stage: Stage, log: Log) -> None:
    service = await Service(stage).created()
    async with socket(stage.url) as client:
        await consume(client)
        await client.say("unconsume", consumer="svc")
        assert await client.hear("stopped") == {"type": "stopped", "consumer": "svc", "reason": "unconsumed"}
        await eventually(lambda: metric("tailrace_delivery_consumer_sessions") == 0)
        await client.say("unconsume", consumer="svc")  # crosses the end: nothing happens
        await consume(client)
        await stage.http.delete(service.path)
        async with asyncio.timeout(30):
            stopped = await client.connection.recv()
        assert stopped == '{"type":"stopped","consumer":"svc","reason":"deleted"}'


async def test_a_drain_sends_stopped_for_every_consumer(stage: Stage) -> None:
    await Service(stage).created()
    async with socket(stage.url) as client:
        await consume(client)
        draining = asyncio.create_task(stage.replica.drain(5))
        assert (await client.hear("stopped"))["reason"] == "drain"
        assert (await client.closed())[0] == 1001
        await draining


async def refusal(client: SocketClient, type_: str, **fields: Any) -> tuple[int, str]:
    answer = await client.ask(type_, id=1, **fields)
    assert answer["type"] == "error", answer
    assert answer.get("consumer") == fields.get("consumer")
    return answer["problem"]["status"], answer["problem"]["type"].rpartition(":")[2]


async def test_invalid_requests_are_refused_and_the_socket_stays_open(stage: Stage) -> None:
    await Service(stage).created()
    async with socket(stage.url) as client:
        assert await refusal(client, "consume", consumer="other") == (404, "not-found")
        assert await refusal(client, "consume", consumer="no name") == (400, "bad-request")
        assert await refusal(client, "settle", consumer="other", acks=[]) == (404, "not-found")
        assert await refusal(client, "settle", consumer="svc", acks=["nonsense"]) == (400, "token-invalid")
        assert await refusal(client, "unconsume", consumer="svc") == (404, "not-found")
        await consume(client)
        assert await refusal(client, "consume", consumer="svc") == (409, "conflict")
        assert await refusal(client, "credit", consumer="svc", events=1) == (409, "conflict")
        assert await refusal(client, "credit", consumer="svc", bytes=1) == (400, "bad-request")


async def test_a_socket_reads_a_bounded_number_of_consumers(stage: Stage) -> None:
    async with socket(stage.url) as client:
        for number in range(9):
            await Service(stage, f"c{number}").created()
            if number < 8:
                await consume(client, f"c{number}")
        assert await refusal(client, "consume", consumer="c8") == (429, "too-many-consumers")


async def test_consume_and_settle_without_the_scope_are_refused(stage: Stage, log: Log) -> None:
    await Service(stage).created()
    await log.append(*story("g1", 0))
    stage.principal = Principal(tenant=TENANT, scopes=frozenset({"read", "start"}))
    async with socket(stage.url) as client:
        assert await refusal(client, "consume", consumer="svc") == (403, "forbidden")
        assert await refusal(client, "settle", consumer="svc", acks=[]) == (403, "forbidden")


async def test_a_consumer_of_another_tenant_is_not_found(stage: Stage) -> None:
    await Service(stage).created()
    stage.principal = Principal(tenant="other")
    async with socket(stage.url) as client:
        assert await refusal(client, "consume", consumer="svc") == (404, "not-found")
