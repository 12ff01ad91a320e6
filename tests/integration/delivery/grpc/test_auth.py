"""Test permissions over gRPC, with the same credentials as over HTTP."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from schemas.codec import encode_event
from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from schemas.subjects import Address, token_subject
from services.kit.auth.config import build_authenticator
from services.kit.clock import SystemClock
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer
from tests.support.credentials import ADMIN, requiring, token
from tests.support.delivery_server import keys, story
from tests.support.grpc_server import Client, Read, serving_calls


@pytest.fixture
async def client(broker: Broker, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Client]:
    shared = requiring(nats_server.url, tmp_path)
    authenticator = build_authenticator(shared, "127.0.0.1", broker, SystemClock())
    async with (
        authenticator.running(),
        serving_calls(nats_server.url, authenticate=authenticator.authenticate) as stage,
        stage.client() as connected,
    ):
        for event in story("g1"):
            subject = token_subject(Address.of("acme", "s", event.generation, 1))
            await broker.publish_stored(subject, encode_event(event))
        yield connected


def as_(credential: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {credential}"),)}


READ = pb.ReadRequest(session="s", generation="g1")


async def test_token_reads_its_own_tenant(client: Client) -> None:
    got = await Read().of(client.read(READ, **as_(token("acme", "read"))))
    assert got.keys == keys(story("g1"))


@pytest.mark.parametrize(
    ("credential", "code"),
    [
        (lambda: None, grpc.StatusCode.UNAUTHENTICATED),
        (lambda: "nonsense", grpc.StatusCode.UNAUTHENTICATED),
        (lambda: token("acme", "read", exp=1), grpc.StatusCode.UNAUTHENTICATED),
        (lambda: token("acme", "start"), grpc.StatusCode.PERMISSION_DENIED),
        (lambda: token("other", "read"), grpc.StatusCode.NOT_FOUND),
        (lambda: ADMIN.text, grpc.StatusCode.NOT_FOUND),
    ],
    ids=["none", "nonsense", "expired", "another-scope", "another-tenant", "operator"],
)
async def test_read_without_permission_is_refused_with_its_status_code(
    client: Client, credential: Callable[[], str | None], code: grpc.StatusCode
) -> None:
    shown = credential()
    options = {} if shown is None else as_(shown)
    assert await client.read(READ, **options).code() is code


@pytest.mark.parametrize(
    ("method", "request_", "scope"),
    [
        ("start", pb.StartRequest(session="s", model="m", messages=[pb.Message(role="user", content="x")]), "start"),
        ("cancel", pb.CancelRequest(session="s", generation="g1"), "cancel"),
        ("generation", pb.GetGenerationRequest(session="s", generation="g1"), "read"),
    ],
)
async def test_each_operation_requires_its_scope(client: Client, method: str, request_: Any, scope: str) -> None:
    call = getattr(client, method)
    others = {"start", "cancel", "read", "consume", "usage"} - {scope}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(request_, **as_(token("acme", *others)))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert await call(request_, **as_(token("acme", scope)))
    if method != "start":
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request_, **as_(token("other", scope)))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_attach_without_credentials_is_refused_before_the_first_message(client: Client) -> None:
    assert await client.attach().code() is grpc.StatusCode.UNAUTHENTICATED
