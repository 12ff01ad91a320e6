"""`Read` over gRPC: replay, joining, resuming, refusals and ends, with a real client and a real broker."""

import asyncio
import json
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from schemas.events import Binary, Cancelled, Completed, Delta, Failed, Interrupted, Notice, Restarted, Started
from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from services.delivery.grpc.problems import PROBLEM_KEY
from services.delivery.settings import Settings
from services.kit.auth.principal import Principal
from services.kit.jetstream.broker import Broker
from services.kit.problem import Problem
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import TENANT, Log, keys, metric, story
from tests.support.grpc_server import Client, GrpcStage, Read, serving_calls


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[GrpcStage]:
    async with serving_calls(nats_server.url) as running:
        yield running
        await eventually(lambda: readers() == 0)


@pytest.fixture
async def client(stage: GrpcStage) -> AsyncIterator[Client]:
    async with stage.client() as connected:
        yield connected


@pytest.fixture
def log(broker: Broker) -> Log:
    return Log(broker)


def readers() -> float:
    return metric("tailrace_delivery_subscribers", transport="grpc")


async def refused(call: grpc.aio.UnaryStreamCall) -> tuple[grpc.StatusCode, dict[str, object]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await Read().of(call)
    trailing = dict(caught.value.trailing_metadata())
    return caught.value.code(), json.loads(trailing[PROBLEM_KEY])


async def test_finished_generation_is_replayed_and_the_call_ends(client: Client, log: Log) -> None:
    events = story("g1")
    await log.append(*events)
    call = client.read(pb.ReadRequest(session="s", generation="g1"))
    got = await Read().of(call)
    assert await call.code() is grpc.StatusCode.OK
    assert got.keys == keys(events)
    assert got.cursors == sorted(set(got.cursors))
    assert [e.WhichOneof("kind") for e in got.events] == ["started", *["delta"] * 10, "usage", "completed"]
    assert "".join(e.delta.text for e in got.events) == "".join(e.text or "" for e in events if isinstance(e, Delta))
    assert (got.events[-2].usage.usage.input, got.events[-2].usage.usage.output) == (3, 10)


async def test_session_stream_stays_open_for_later_generations(client: Client, log: Log) -> None:
    first, second = story("g1"), story("g2")
    await log.append(*first)
    call = client.read(pb.ReadRequest(session="s"))
    got = await Read().of(call, len(first))
    await log.append(*second)
    await got.of(call, len(first) + len(second))
    assert got.keys == keys(first + second)
    call.cancel()


async def test_every_kind_of_event_arrives_with_its_fields(client: Client, log: Log) -> None:
    await log.append(
        Started(generation="a", seq=0, model="m", provider="p", upstream_model="u", metadata={"user": "ü"}),
        Delta(generation="a", seq=1, binary=Binary(media_type="image/png", data=bytes(range(256)))),
        Notice(generation="a", seq=2, code="retrying", attempt=2, delay=0.5),
        Delta(generation="a", seq=3, reasoning="hm", choice=1, tokens=7, provider_at=1.5),
        Restarted(generation="a", seq=4, epoch=2, reason="lost"),
        Failed(generation="a", seq=5, epoch=2, code="upstream", upstream_status=500, recoverable=True),
    )
    await log.append(Cancelled(generation="b", seq=0, reason="requested"))
    await log.append(Interrupted(generation="c", seq=0, reason="lost"))
    await log.append_bytes("d", b'{"type":"novelty","generation":"d","seq":0,"wonder":[1,2]}')
    call = client.read(pb.ReadRequest(session="s", begin=pb.BEGIN_START))
    got = await Read().of(call, 9)
    call.cancel()
    started, binary, notice, reasoning, restarted, failed, cancelled, interrupted, novelty = got.events
    assert dict(started.started.metadata) == {"user": "ü"}
    assert binary.delta.binary.data == bytes(range(256))
    assert (notice.notice.attempt, notice.notice.delay, notice.notice.HasField("provider")) == (2, 0.5, False)
    assert (reasoning.delta.WhichOneof("content"), reasoning.delta.choice, reasoning.delta.tokens) == (
        "reasoning",
        1,
        7,
    )
    assert (restarted.epoch, restarted.restarted.reason) == (2, "lost")
    assert (failed.failed.upstream_status, failed.failed.recoverable) == (500, True)
    assert cancelled.cancelled.reason == "requested"
    assert interrupted.interrupted.reason == "lost"
    assert (novelty.type, json.loads(novelty.json)["wonder"]) == ("novelty", [1, 2])


async def test_resume_after_any_cursor_continues_at_the_next_event(client: Client, log: Log) -> None:
    events = story("g1", 20)
    await log.append(*events)
    whole = await Read().of(client.read(pb.ReadRequest(session="s", generation="g1")))
    for place in range(len(events)):
        rest = await Read().of(client.read(pb.ReadRequest(session="s", generation="g1", after=whole.cursors[place])))
        assert rest.keys == keys(events)[place + 1 :]


async def test_live_begin_skips_stored_events(client: Client, log: Log) -> None:
    await log.append(*story("g1"))
    call = client.read(pb.ReadRequest(session="s", begin=pb.BEGIN_LIVE))
    await call.initial_metadata()
    await eventually(lambda: readers() == 1)
    await log.append(*story("g2"))
    got = await Read().of(call, 13)
    call.cancel()
    assert got.keys == keys(story("g2"))


@pytest.mark.parametrize(
    ("request_", "code", "slug"),
    [
        (pb.ReadRequest(session="a b"), grpc.StatusCode.INVALID_ARGUMENT, "bad-request"),
        (pb.ReadRequest(session="s", begin=7), grpc.StatusCode.INVALID_ARGUMENT, "bad-request"),  # type: ignore[arg-type]
        (pb.ReadRequest(session="s", generation="none"), grpc.StatusCode.NOT_FOUND, "not-found"),
        (pb.ReadRequest(session="s", after="nonsense"), grpc.StatusCode.INVALID_ARGUMENT, "cursor-invalid"),
    ],
)
async def test_refusal_has_status_code_and_problem(
    client: Client, request_: pb.ReadRequest, code: grpc.StatusCode, slug: str
) -> None:
    got, problem = await refused(client.read(request_))
    assert got is code
    assert str(problem["type"]).endswith(f":{slug}")


async def test_expired_cursor_is_out_of_range(client: Client, log: Log) -> None:
    await log.append(*story("g1"))
    cursor = (await Read().of(client.read(pb.ReadRequest(session="s", generation="g1")))).cursors[0]
    older = cursor[:4] + "00000000" + cursor[12:]
    code, problem = await refused(client.read(pb.ReadRequest(session="s", after=older)))
    assert (code, problem["status"]) == (grpc.StatusCode.OUT_OF_RANGE, 410)


async def test_credentials_are_the_metadata_and_another_scope_is_denied(
    broker: Broker, nats_server: NatsServer, log: Log
) -> None:
    await log.append(*story("g1"))

    async def authenticate(authorization: str | None) -> Principal:
        match authorization:
            case "Bearer reader":
                return Principal(tenant=TENANT, scopes=frozenset({"read"}), sessions=("s",))
            case "Bearer starter":
                return Principal(tenant=TENANT, scopes=frozenset({"start"}))
        raise Problem(401, "no credentials were given")

    async with serving_calls(nats_server.url, authenticate=authenticate) as stage, stage.client() as client:
        request = pb.ReadRequest(session="s", generation="g1")

        def call(bearer: str, read: pb.ReadRequest = request) -> grpc.aio.UnaryStreamCall:
            return client.read(read, metadata=(("authorization", f"Bearer {bearer}"),))

        assert (await refused(client.read(request)))[0] is grpc.StatusCode.UNAUTHENTICATED
        assert (await refused(call("starter")))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert (await refused(call("reader", pb.ReadRequest(session="other"))))[0] is grpc.StatusCode.NOT_FOUND
        assert len((await Read().of(call("reader"))).events) == 13


async def test_cancelling_the_call_frees_the_subscriber(stage: GrpcStage, client: Client, log: Log) -> None:
    await log.append(*story("g1")[:5])
    call = client.read(pb.ReadRequest(session="s"))
    await Read().of(call, 5)
    assert readers() == 1
    call.cancel()
    await eventually(lambda: readers() == 0)
    assert not any(feed.subscribers for feed in stage.replica.feeds._feeds.values())


async def test_deadline_of_the_client_ends_the_call_and_frees_the_subscriber(client: Client, log: Log) -> None:
    await log.append(*story("g1")[:5])
    call = client.read(pb.ReadRequest(session="s"), timeout=0.5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await Read().of(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: readers() == 0)


async def test_drain_sends_bye_with_a_cursor_that_another_server_accepts(
    broker: Broker, nats_server: NatsServer, log: Log
) -> None:
    events = story("g1", 30)
    await log.append(*events[:10])
    async with serving_calls(nats_server.url) as other:
        async with serving_calls(nats_server.url) as one, one.client() as client:
            call = client.read(pb.ReadRequest(session="s"))
            got = await Read().of(call, 10)
            await one.replica.drain(2)
            await got.of(call)
            assert await call.code() is grpc.StatusCode.OK
            assert (await refused(client.read(pb.ReadRequest(session="s"))))[0] is grpc.StatusCode.UNAVAILABLE
        assert [bye.reason for bye in got.byes] == ["drain"]
        assert got.byes[0].cursor == got.cursors[-1]
        await log.append(*events[10:])
        async with other.client() as client:
            call = client.read(pb.ReadRequest(session="s", after=got.byes[0].cursor))
            await got.of(call, len(events))
            call.cancel()
    assert got.keys == keys(events)


async def test_stalled_client_uses_bounded_memory_and_is_evicted_while_others_continue(
    broker: Broker, nats_server: NatsServer, log: Log
) -> None:
    async with (
        serving_calls(nats_server.url, settings=Settings(stall=2.0, feed_bytes=262_144)) as stage,
        # Its own connection: what one client leaves unread fills no window of the other.
        stage.client(("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)) as stuck,
        stage.client(("grpc.use_local_subchannel_pool", 1)) as fast,
    ):
        idle = stuck.read(pb.ReadRequest(session="s", begin=pb.BEGIN_START))
        await idle.initial_metadata()
        busy = fast.read(pb.ReadRequest(session="s", begin=pb.BEGIN_START))
        events = story("g1", 400, size=20_000)
        writing = asyncio.create_task(log.append(*events))
        got = await Read().of(busy, len(events))
        await writing
        assert got.keys == keys(events)
        evicted = metric("tailrace_delivery_streams_closed_total", reason="evicted")
        await eventually(
            lambda: metric("tailrace_delivery_streams_closed_total", reason="evicted") > evicted or readers() == 1
        )
        late = Read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await late.of(idle)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert late.keys == keys(events)[: len(late.keys)]
        assert len(late.keys) < len(events)
        rest = await late.of(fast.read(pb.ReadRequest(session="s", after=late.cursors[-1])), len(events))
        assert rest.keys == keys(events)
        busy.cancel()
    assert isinstance(events[-1], Completed)
