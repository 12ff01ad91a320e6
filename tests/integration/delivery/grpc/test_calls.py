"""Unary calls, health, reflection, TLS and limits of the gRPC port; and bytes that are no gRPC at all."""

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from services.delivery.grpc.problems import PROBLEM_KEY
from services.kit.http import PortTaken
from services.kit.jetstream.broker import Broker
from services.kit.tls import server_tls
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, metric, story
from tests.support.grpc_server import PATH, Client, GrpcStage, Read, serving_calls

ASK = pb.StartRequest(
    session="s", model="m", messages=[pb.Message(role="user", content="hi")], idempotency_key="k", metadata={"a": "b"}
)


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[GrpcStage]:
    async with serving_calls(nats_server.url) as running:
        yield running


@pytest.fixture
async def client(stage: GrpcStage) -> AsyncIterator[Client]:
    async with stage.client() as connected:
        yield connected


async def test_start_queues_once_for_a_key(client: Client) -> None:
    first, second = await client.start(ASK), await client.start(ASK)
    assert (first.repeated, second.repeated) == (False, True)
    assert first.generation == second.generation
    shown = await client.generation(pb.GetGenerationRequest(session="s", generation=first.generation))
    assert (shown.state, json.loads(shown.json)["metadata"]) == ("queued", {"a": "b"})


async def test_the_same_key_with_another_body_already_exists(client: Client) -> None:
    await client.start(ASK)
    other = pb.StartRequest()
    other.CopyFrom(ASK)
    other.options = json.dumps({"priority": "batch"}).encode()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.start(other)
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    trailing = dict(caught.value.trailing_metadata())
    assert json.loads(trailing[PROBLEM_KEY])["type"] == "urn:tailrace:problem:idempotency-conflict"


async def test_messages_may_be_json(client: Client) -> None:
    parts = json.dumps({"role": "user", "content": [{"type": "text", "text": "hi"}]}).encode()
    answer = await client.start(pb.StartRequest(session="s", model="m", messages=[pb.Message(json=parts)]))
    assert answer.state == "queued"


async def test_generation_returns_state_text_and_finish_reason(client: Client, broker: Broker) -> None:
    await Log(broker).append(*story("g1", 3))
    shown = await client.generation(pb.GetGenerationRequest(session="s", generation="g1"))
    assert (shown.state, shown.text, shown.finish_reason) == ("completed", "g1:1 g1:2 g1:3 ", "stop")


async def test_cancel_of_an_unknown_generation_is_not_found(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.cancel(pb.CancelRequest(session="s", generation="none"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_unknown_method_is_unimplemented(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.channel.unary_unary(PATH + "Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_is_serving_until_the_replica_drains(stage: GrpcStage, client: Client) -> None:
    probe = health_pb2_grpc.HealthStub(client.channel)

    async def status(service: str) -> int:
        answer = await probe.Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)

    async def both(wanted: int) -> bool:
        return [await status(""), await status("tailrace.v1.Delivery")] == [wanted, wanted]

    await eventually(lambda: both(health_pb2.HealthCheckResponse.SERVING))
    stage.replica.supervisor.draining = True
    await eventually(lambda: both(health_pb2.HealthCheckResponse.NOT_SERVING))


async def test_reflection_lists_and_describes_the_service(stage: GrpcStage) -> None:
    def look() -> tuple[list[str], list[str]]:
        with grpc.insecure_channel(stage.target) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            file = database.FindFileContainingSymbol("tailrace.v1.Delivery")
            return list(database.get_services()), [method.name for method in file.service[0].method]

    services, methods = await asyncio.to_thread(look)
    assert {"tailrace.v1.Delivery", "grpc.health.v1.Health"} <= set(services)
    assert methods == ["Read", "Attach", "Consume", "Start", "Cancel", "GetGeneration"]


async def test_control_characters_in_the_name_of_a_model_are_refused(client: Client) -> None:
    messages = [pb.Message(role="user", content="hi")]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.start(pb.StartRequest(session="s", model="m\x1b[2J", messages=messages))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "U+001B" in str(caught.value.details())


async def test_request_that_is_too_large_is_refused(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.start(pb.StartRequest(session="s", options=b" " * 2_000_000))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_calls_beyond_the_bound_are_refused_until_another_ends(broker: Broker, nats_server: NatsServer) -> None:
    async with serving_calls(nats_server.url, calls=3) as stage, stage.client() as client:
        open_ = [client.read(pb.ReadRequest(session="s")) for _ in range(3)]
        for call in open_:
            await call.initial_metadata()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Read().of(client.read(pb.ReadRequest(session="s")))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        open_.pop().cancel()

        async def comes_in() -> bool:
            call = client.read(pb.ReadRequest(session="s"))
            try:
                await call.initial_metadata()
                return not call.done()
            finally:
                call.cancel()

        await eventually(comes_in)
        for call in open_:
            call.cancel()
        await eventually(lambda: metric("tailrace_delivery_subscribers", transport="grpc") == 0)


async def test_port_in_use_raises_port_taken_with_the_port(stage: GrpcStage) -> None:
    from services.delivery.grpc.server import serving_grpc

    with pytest.raises(PortTaken, match=str(stage.port)):
        async with serving_grpc(stage.delivery, "127.0.0.1", stage.port):
            pass


async def test_tls_serves_clients_that_trust_the_certificate_and_refuses_plaintext(
    broker: Broker, nats_server: NatsServer, tmp_path: Path
) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    tls = server_tls(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    await Log(broker).append(*story("g1"))
    async with serving_calls(nats_server.url, tls=tls) as stage:
        credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        async with grpc.aio.secure_channel(f"localhost:{stage.port}", credentials) as channel:
            got = await Read().of(Client(channel).read(pb.ReadRequest(session="s", generation="g1")))
            assert len(got.events) == 13
        async with stage.client() as client:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await Read().of(client.read(pb.ReadRequest(session="s"), timeout=5))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def _talk(port: int, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.settimeout(0.5)
        try:
            connection.sendall(data)
            while connection.recv(65_536):
                pass
        except OSError:
            return


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def _frame(rng: random.Random) -> bytes:
    payload = rng.randbytes(rng.choice([0, 4, 5, 6, 8, 40]))
    size = rng.choice([len(payload), len(payload), rng.randrange(1 << 24)])
    stream = rng.choice([0, 1, 3, rng.randrange(1 << 31)])
    return size.to_bytes(3) + bytes([rng.randrange(12), rng.randrange(256)]) + stream.to_bytes(4) + payload


async def test_bytes_that_are_no_grpc_leave_the_server_as_it_was(stage: GrpcStage, broker: Broker) -> None:
    rng = random.Random(20)
    settings = b"\0\0\0\4\0\0\0\0\0"
    samples = [rng.randbytes(rng.randrange(1, 4_000)) for _ in range(10)]
    samples += [PREFACE + settings + b"".join(_frame(rng) for _ in range(rng.randrange(1, 20))) for _ in range(40)]
    samples += [b"GET /v1/sessions HTTP/1.1\r\nHost: x\r\n\r\n", PREFACE, b""]
    await asyncio.gather(*(asyncio.to_thread(_talk, stage.port, sample) for sample in samples))
    await Log(broker).append(*story("g1"))
    async with stage.client() as client:
        got = await Read().of(client.read(pb.ReadRequest(session="s", generation="g1")))
    assert len(got.events) == 13


async def test_messages_that_are_no_protobuf_end_their_call_alone(
    stage: GrpcStage, client: Client, broker: Broker
) -> None:
    rng = random.Random(7)
    await Log(broker).append(*story("g1"))
    for _ in range(60):
        data = rng.randbytes(rng.randrange(0, 200))
        name = rng.choice(["Start", "Cancel", "GetGeneration"])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.channel.unary_unary(PATH + name)(data, timeout=10)
        assert caught.value.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
    for _ in range(30):
        call = client.channel.stream_stream(PATH + "Attach")(timeout=10)
        for _ in range(3):
            await call.write(rng.randbytes(rng.randrange(0, 60)))
        await call.done_writing()
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        assert await call.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
    got = await Read().of(client.read(pb.ReadRequest(session="s", generation="g1")))
    assert len(got.events) == 13
    await eventually(lambda: metric("tailrace_delivery_subscribers", transport="grpc") == 0)
