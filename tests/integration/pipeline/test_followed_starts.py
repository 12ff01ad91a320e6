"""Starts over WebSocket and gRPC whose generation is read over the same connection."""

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from services.kit.jetstream.broker import Broker
from services.kit.problem import Problem
from tests.conftest import NatsServer
from tests.support.delivery_server import Stage, delivering
from tests.support.grpc_server import Attached, GrpcStage, serving_calls
from tests.support.producer_worker import producing
from tests.support.websocket_client import JSON, MSGPACK, SocketClient, socket

REQUEST: dict[str, Any] = {
    "model": "scripted/story",
    "messages": [{"role": "user", "content": "rivers"}],
    "params": {"tokens": 30, "tokens_per_second": 400},
}
OPTIONS = json.dumps({"params": REQUEST["params"]}).encode()


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url) as made, producing(broker):
        yield made


@pytest.fixture
async def calls(broker: Broker, nats_server: NatsServer) -> AsyncIterator[GrpcStage]:
    async with serving_calls(nats_server.url) as made, producing(broker):
        yield made


async def ended(client: SocketClient) -> list[dict[str, Any]]:
    """Read to the end of the subscription; return the events of its session."""
    end = await client.hear("end")
    assert end["reason"] == "complete"
    return client.events["s"]


@pytest.mark.parametrize("subprotocol", [JSON, MSGPACK])
async def test_start_with_a_subscription_is_answered_and_read(stage: Stage, subprotocol: str) -> None:
    async with socket(stage.url, subprotocol) as client:
        accepted = await client.ask("start", id=1, session="s", request=REQUEST, subscribe={})
        assert accepted["type"] == "accepted"
        subscribed = await client.hear("subscribed")
        assert (subscribed["id"], subscribed["session"]) == (1, "s")
        events = await ended(client)
        assert {event["generation"] for event in events} == {accepted["generation"]}
        assert [events[0]["type"], events[-1]["type"]] == ["started", "completed"]
        assert [event["seq"] for event in events] == list(range(len(events)))
        again = await client.ask("start", id=2, session="s", request=REQUEST, subscribe={"granularity": "line"})
        assert again["type"] == "accepted", "the first subscription has ended with its generation"


async def test_credit_of_a_start_limits_its_subscription(stage: Stage) -> None:
    async with socket(stage.url) as client:
        await client.ask("start", id=1, session="s", request=REQUEST, subscribe={"credit": {"events": 3}})
        await client.gather("s", 3)
        assert (await client.ask("ping", id=9))["type"] == "pong"
        assert len(client.events["s"]) == 3
        await client.say("credit", session="s", events=1_000)
        assert (await ended(client))[-1]["type"] == "completed"


@pytest.mark.parametrize(
    ("subscribe", "status"),
    [
        ({"granularity": "word"}, 400),
        ({"credit": {"events": 1}, "window": "auto"}, 400),
        ({"generation": "g1"}, 400),
    ],
)
async def test_wrong_subscription_of_a_start_queues_nothing(
    stage: Stage, broker: Broker, subscribe: dict[str, Any], status: int
) -> None:
    async with socket(stage.url) as client:
        await client.say("start", id=1, session="s", request=REQUEST, subscribe=subscribe)
        error = await client.hear("error")
        assert error["problem"]["status"] == status
    assert await stage.replica.lookups.of_session("default", "s") == []
    assert await broker.count("REQUESTS", "requests.>") == 0


async def test_start_of_a_session_that_is_read_already_queues_nothing(stage: Stage) -> None:
    async with socket(stage.url) as client:
        await client.ask("subscribe", id=1, session="s")
        error = await client.ask("start", id=2, session="s", request=REQUEST, subscribe={})
        assert (error["type"], error["problem"]["status"]) == ("error", 409)
        assert await stage.replica.lookups.of_session("default", "s") == []
        accepted = await client.ask("start", id=3, session="s", request=REQUEST)
        assert accepted["type"] == "accepted"
        await eventually_completed(client, accepted["generation"])


async def eventually_completed(client: SocketClient, generation: str) -> None:
    while not any(e["type"] == "completed" and e["generation"] == generation for e in client.events.get("s", [])):
        await client.hear()


async def test_refused_start_frees_its_place(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*_: object) -> tuple[str, str, bool]:
        raise Problem(429, "too many")

    async with socket(stage.url) as client:
        with monkeypatch.context() as patch:
            patch.setattr(stage.replica.intake, "accept", refused)
            error = await client.ask("start", id=1, session="s", request=REQUEST, subscribe={})
        assert error["problem"]["status"] == 429
        assert (await client.ask("start", id=2, session="s", request=REQUEST, subscribe={}))["type"] == "accepted"
        assert (await ended(client))[-1]["type"] == "completed"


def start(**fields: Any) -> pb.StartRequest:
    messages = [pb.Message(role="user", content="rivers")]
    return pb.StartRequest(session="s", model="scripted/story", messages=messages, options=OPTIONS, **fields)


async def test_attach_starts_and_follows_under_one_id(calls: GrpcStage) -> None:
    async with calls.client() as client:
        one = Attached(client)
        await one.say("a", start=start(follow=pb.Subscribe()))
        await one.until(lambda: "ended" in one.kinds("a"))
        assert one.kinds("a") == ["start", "subscribed", "ended"]
        generation = one.said["a"][0][1].generation
        assert {event.generation for event in one.reads["a"].events} == {generation}
        assert [event.seq for event in one.reads["a"].events] == list(range(one.count("a")))
        await one.say("a", start=start(follow=pb.Subscribe(credit=pb.Credit(events=2))))
        await one.until(lambda: one.kinds("a").count("subscribed") == 2)
        await one.call.done_writing()


@pytest.mark.parametrize(
    "follow",
    [
        pb.Subscribe(read=pb.ReadRequest(session="other")),
        pb.Subscribe(read=pb.ReadRequest(granularity="word")),
        pb.Subscribe(credit=pb.Credit(events=1), auto_window=True),
    ],
)
async def test_wrong_follow_queues_nothing(calls: GrpcStage, broker: Broker, follow: pb.Subscribe) -> None:
    async with calls.client() as client:
        one = Attached(client)
        await one.say("a", start=start(follow=follow))
        await one.until(lambda: one.kinds("a"))
        assert (one.kinds("a"), one.last("a").status) == (["problem"], 400)
        await one.say("a", start=start())
        await one.until(lambda: "start" in one.kinds("a"))
    assert len(await calls.replica.lookups.of_session("default", "s")) == 1


async def test_unary_start_refuses_to_follow(calls: GrpcStage) -> None:
    async with calls.client() as client:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.start(start(follow=pb.Subscribe()))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
