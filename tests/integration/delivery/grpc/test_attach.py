"""Test `Attach` over gRPC: several sessions over one call, credit, windows, and requests on the same call."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from services.delivery.settings import Settings
from services.kit.auth.principal import Principal
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import TENANT, Log, keys, metric, story
from tests.support.grpc_server import Attached, GrpcStage, serving_calls


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[GrpcStage]:
    async with serving_calls(nats_server.url) as running:
        yield running
        await eventually(lambda: metric("tailrace_delivery_subscribers", transport="grpc") == 0)


@pytest.fixture
async def attached(stage: GrpcStage) -> AsyncIterator[Attached]:
    async with stage.client() as client:
        one = Attached(client)
        yield one
        one.call.cancel()


@pytest.fixture
def log(broker: Broker) -> Log:
    return Log(broker)


async def silence(attached: Attached) -> None:
    """Wait for the reply to a message sent last, so that all earlier messages have arrived."""
    await attached.say("silence", unsubscribe=pb.Unsubscribe())
    await attached.until(lambda: "problem" in attached.kinds("silence"))
    attached.said.pop("silence")


async def test_one_call_streams_several_sessions(attached: Attached, broker: Broker) -> None:
    for session in ("a", "b", "c"):
        await Log(broker, session).append(*story(f"g-{session}"))
        await attached.subscribe(session, session)
    await attached.until(lambda: all(attached.count(s) == 13 for s in "abc"))
    for session in "abc":
        assert attached.reads[session].keys == keys(story(f"g-{session}"))
        assert attached.kinds(session) == ["subscribed"]


async def test_no_more_events_than_the_credit_are_sent(attached: Attached, log: Log) -> None:
    await log.append(*story("g1", 30))
    await attached.subscribe("one", credit=pb.Credit(events=5))
    await attached.until(lambda: attached.count("one") == 5)
    await silence(attached)
    assert attached.count("one") == 5
    await attached.say("one", credit=pb.Credit(events=7))
    await attached.until(lambda: attached.count("one") == 12)
    await log.append(*story("g2"))
    await silence(attached)
    assert attached.count("one") == 12
    await attached.say("one", credit=pb.Credit(events=1_000))
    await attached.until(lambda: attached.count("one") == 33 + 13)
    assert attached.reads["one"].keys == keys(story("g1", 30) + story("g2"))


async def test_live_events_wait_for_credit_and_are_then_sent_at_once(attached: Attached, log: Log) -> None:
    await log.append(*story("g1", 0))
    await attached.subscribe("one", credit=pb.Credit(events=3))
    await attached.until(lambda: attached.count("one") == 3)
    await log.append(*story("g2", 20))
    await silence(attached)
    assert attached.count("one") == 3
    await attached.say("one", credit=pb.Credit(events=23))
    await attached.until(lambda: attached.count("one") == 26)


async def test_credit_in_bytes_is_exceeded_by_one_event_at_most(attached: Attached, log: Log) -> None:
    await log.append(*story("g1", 30, size=1_000))
    await attached.subscribe("one", credit=pb.Credit(bytes=5_000))
    await attached.until(lambda: attached.count("one") >= 4)
    await silence(attached)
    assert 4 <= attached.count("one") <= 6


async def test_acknowledged_events_may_be_sent_again(attached: Attached, log: Log) -> None:
    events = story("g1", 50)
    await log.append(*events)
    await attached.subscribe("one", credit=pb.Credit(events=4))
    while attached.count("one") < len(events):
        got = attached.count("one")
        await attached.until(lambda got=got: attached.count("one") >= min(got + 4, len(events)))
        await silence(attached)
        assert attached.count("one") <= got + 4
        await attached.say("one", ack=pb.Ack(cursor=attached.reads["one"].cursors[-1]))
    assert attached.reads["one"].keys == keys(events)


async def test_window_that_follows_acknowledgements_brings_everything(attached: Attached, log: Log) -> None:
    events = story("g1", 300, size=2_000)
    await log.append(*events)
    await attached.subscribe("one", auto_window=True)
    await attached.until(lambda: attached.count("one") >= 20)
    await silence(attached)
    assert attached.count("one") < 60
    while attached.count("one") < len(events):
        got = attached.count("one")
        await attached.say("one", ack=pb.Ack(cursor=attached.reads["one"].cursors[-1]))
        await attached.until(lambda got=got: attached.count("one") > got)
    assert attached.reads["one"].keys == keys(events)


async def test_subscription_without_credit_does_not_block_another(attached: Attached, broker: Broker) -> None:
    await Log(broker, "a").append(*story("g1", 100))
    await Log(broker, "b").append(*story("g2", 100))
    await attached.subscribe("poor", "a", credit=pb.Credit(events=1))
    await attached.subscribe("rich", "b")
    await attached.until(lambda: attached.count("rich") == 103 and attached.count("poor") == 1)


async def test_unsubscribing_ends_one_and_frees_its_id(attached: Attached, log: Log) -> None:
    await log.append(*story("g1"))
    await attached.subscribe("one")
    await attached.until(lambda: attached.count("one") == 13)
    await attached.say("one", unsubscribe=pb.Unsubscribe())
    await attached.until(lambda: "ended" in attached.kinds("one"))
    assert attached.last("one").reason == "unsubscribed"
    await attached.subscribe("one")
    await attached.until(lambda: attached.count("one") == 26)


async def test_generation_ends_its_subscription_and_resuming_behind_the_end_is_complete(
    attached: Attached, log: Log
) -> None:
    await log.append(*story("g1"))
    await attached.subscribe("one", read=pb.ReadRequest(session="s", generation="g1"))
    await attached.until(lambda: "ended" in attached.kinds("one"))
    assert (attached.count("one"), attached.last("one").reason) == (13, "terminal")
    after = attached.reads["one"].cursors[-1]
    await attached.subscribe("two", read=pb.ReadRequest(session="s", generation="g1", after=after))
    await attached.until(lambda: "ended" in attached.kinds("two"))
    assert (attached.count("two"), attached.last("two").reason) == (0, "complete")


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ({"subscribe": pb.Subscribe(read=pb.ReadRequest(session="no name"))}, 400),
        ({"subscribe": pb.Subscribe(read=pb.ReadRequest(session="s", generation="none"))}, 404),
        ({"subscribe": pb.Subscribe(credit=pb.Credit(events=1), auto_window=True)}, 400),
        ({"credit": pb.Credit(events=1)}, 404),
        ({"ack": pb.Ack(cursor="x")}, 404),
        ({"start": pb.StartRequest(session="s", model="m")}, 400),
        ({"start": pb.StartRequest(session="s", model="m", options=b"\xff")}, 400),
        ({"cancel": pb.CancelRequest(session="s", generation="none")}, 404),
        ({}, 400),
    ],
)
async def test_a_refused_subscription_gets_a_problem_and_the_call_stays_open(
    attached: Attached, log: Log, kind: dict[str, Any], status: int
) -> None:
    await attached.say("one", **kind)
    await attached.until(lambda: attached.kinds("one") == ["problem"])
    assert attached.last("one").status == status
    await log.append(*story("g1"))
    await attached.subscribe("two")
    await attached.until(lambda: attached.count("two") == 13)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ({"subscribe": pb.Subscribe(read=pb.ReadRequest(session="s"))}, 409),
        ({"credit": pb.Credit(events=1)}, 409),
        ({"ack": pb.Ack(cursor="x")}, 400),
        ({"ack": pb.Ack(cursor="t100" + "f" * 28)}, 409),
    ],
)
async def test_an_invalid_message_gets_a_problem_and_the_subscription_continues(
    attached: Attached, log: Log, kind: dict[str, Any], status: int
) -> None:
    await attached.subscribe("one")
    await attached.until(lambda: attached.kinds("one") == ["subscribed"])
    await attached.say("one", **kind)
    await attached.until(lambda: "problem" in attached.kinds("one"))
    assert attached.last("one").status == status
    await log.append(*story("g1"))
    await attached.until(lambda: attached.count("one") == 13)


async def test_start_and_cancel_work_while_a_subscription_is_open(attached: Attached, stage: GrpcStage) -> None:
    await attached.subscribe("one")
    request = pb.StartRequest(session="s", model="m", messages=[pb.Message(role="user", content="hi")])
    await attached.say("ask", start=request)
    await attached.until(lambda: "start" in attached.kinds("ask"))
    answer = attached.last("ask")
    assert (answer.session, answer.state, answer.repeated) == ("s", "queued", False)
    await attached.say("stop", cancel=pb.CancelRequest(session="s", generation=answer.generation))
    await attached.until(lambda: "cancel" in attached.kinds("stop"))
    assert attached.last("stop").state == "cancelling"


async def test_client_that_has_closed_its_sending_side_is_served_to_the_end(attached: Attached, log: Log) -> None:
    await log.append(*story("g1")[:4])
    await attached.subscribe("one", read=pb.ReadRequest(session="s", generation="g1"))
    await attached.call.done_writing()
    await attached.until(lambda: attached.count("one") == 4)
    await log.append(*story("g1")[4:])
    await attached.to_the_end()
    assert attached.count("one") == 13
    assert await attached.call.code() is grpc.StatusCode.OK


async def test_cancelling_the_call_frees_every_subscription(stage: GrpcStage, attached: Attached, log: Log) -> None:
    await log.append(*story("g1"))
    for number in range(20):
        await attached.subscribe(str(number))
    await attached.until(lambda: all(attached.count(str(n)) == 13 for n in range(20)))
    assert metric("tailrace_delivery_subscribers", transport="grpc") == 20
    attached.call.cancel()
    await eventually(lambda: metric("tailrace_delivery_subscribers", transport="grpc") == 0)
    assert not stage.replica.supervisor._supervised


async def test_drain_ends_subscriptions_with_a_cursor_and_then_the_call(
    broker: Broker, nats_server: NatsServer, log: Log
) -> None:
    await log.append(*story("g1"))
    async with serving_calls(nats_server.url, grace=lambda: 5.0) as stage, stage.client() as client:
        busy = Attached(client)
        await busy.subscribe("one")
        await busy.until(lambda: busy.count("one") == 13)
        await stage.replica.drain(5)
        await busy.to_the_end()
        assert await busy.call.code() is grpc.StatusCode.OK
    assert [bye.reason for bye in busy.reads["one"].byes] == ["drain"]
    assert busy.reads["one"].byes[0].cursor == busy.reads["one"].cursors[-1]
    assert busy.last("one").reason == "drain"


async def test_stalled_client_is_evicted_with_all_its_subscriptions(
    broker: Broker, nats_server: NatsServer, log: Log
) -> None:
    async with (
        serving_calls(nats_server.url, settings=Settings(stall=1.0)) as stage,
        stage.client(("grpc.http2.bdp_probe", 0)) as client,
    ):
        attached = Attached(client)
        await attached.subscribe("one")
        await log.append(*story("g1", 300, size=20_000))
        await eventually(lambda: metric("tailrace_delivery_subscribers", transport="grpc") == 0, timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await attached.to_the_end()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert 0 < attached.count("one") < 303


async def test_start_with_the_read_scope_alone_is_refused(broker: Broker, nats_server: NatsServer) -> None:
    async def reader(_authorization: str | None) -> Principal:
        return Principal(tenant=TENANT, scopes=frozenset({"read"}))

    async with serving_calls(nats_server.url, authenticate=reader) as stage, stage.client() as client:
        attached = Attached(client)
        await attached.say("ask", start=pb.StartRequest(session="s", model="m"))
        await attached.until(lambda: attached.kinds("ask") == ["problem"])
        assert attached.last("ask").status == 403
        attached.call.cancel()


async def test_client_that_sends_and_never_reads_is_evicted(broker: Broker, nats_server: NatsServer) -> None:
    async with (
        serving_calls(nats_server.url, settings=Settings(stall=1.0)) as stage,
        stage.client(("grpc.http2.bdp_probe", 0)) as client,
    ):
        attached = Attached(client)
        nonsense = pb.AttachRequest(id="x" * 64)
        writing = asyncio.create_task(_repeat(attached, nonsense))
        await eventually(
            lambda: metric("tailrace_delivery_grpc_calls_total", method="Attach", code="UNAVAILABLE") > 0, timeout=60
        )
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        attached.call.cancel()


async def _repeat(attached: Attached, request: pb.AttachRequest) -> None:
    while True:
        await attached.call.write(request)


async def test_idle_call_ends_with_the_replica(broker: Broker, nats_server: NatsServer) -> None:
    async with serving_calls(nats_server.url) as stage, stage.client() as client:
        attached = Attached(client)
        await attached.call.initial_metadata()
        draining = asyncio.create_task(stage.replica.drain(10))
        await attached.to_the_end()
        assert await attached.call.code() is grpc.StatusCode.OK
        await draining


async def test_credentials_that_expire_end_the_call_with_all_it_reads(
    broker: Broker, nats_server: NatsServer, log: Log
) -> None:
    async def brief(_authorization: str | None) -> Principal:
        return Principal(tenant=TENANT, expires_at=time.time() + 2)

    await log.append(*story("g1"))
    async with serving_calls(nats_server.url, authenticate=brief) as stage, stage.client() as client:
        attached = Attached(client)
        await attached.subscribe("one")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await attached.to_the_end()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert [bye.reason for bye in attached.reads["one"].byes] == ["expired"]
        assert attached.reads["one"].keys == keys(story("g1"))


async def test_revoked_key_ends_the_call_at_once(broker: Broker, nats_server: NatsServer, log: Log) -> None:
    async def keyed(_authorization: str | None) -> Principal:
        return Principal(tenant=TENANT, key="key_1")

    await log.append(*story("g1"))
    async with serving_calls(nats_server.url, authenticate=keyed) as stage, stage.client() as client:
        attached = Attached(client)
        await attached.subscribe("one")
        await attached.until(lambda: attached.count("one") == 13)
        stage.replica.supervisor.open_streams.revoke(frozenset({"key_1"}))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await attached.to_the_end()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
