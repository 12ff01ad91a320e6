"""Test permissions over a socket: credentials at the handshake, scopes and sessions per message, expiry."""

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from schemas.codec import encode_event
from schemas.events import AnyEvent
from schemas.subjects import Address, token_subject
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.credentials import bearer, guarded, token
from tests.support.delivery_server import Stage, delivering, keys, metric, story
from tests.support.websocket_client import socket

BODY = {"model": "scripted/story", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Stage]:
    async with guarded(nats_server.url, tmp_path) as running:
        yield running
        await eventually(lambda: metric("tailrace_delivery_sockets") == 0)


async def append(broker: Broker, tenant: str, events: list[AnyEvent]) -> None:
    for event in events:
        subject = token_subject(Address.of(tenant, "s", event.generation, 1))
        await broker.publish_stored(subject, encode_event(event))


def refusal(error: InvalidStatus) -> tuple[int, str]:
    problem = json.loads(error.response.body)
    return error.response.status_code, problem["type"].rsplit(":", 1)[-1]


async def test_handshake_without_credentials_is_refused_with_a_challenge(stage: Stage) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with socket(stage.url):
            pass
    assert refusal(refused.value) == (401, "unauthenticated")
    assert refused.value.response.headers["www-authenticate"].startswith("Bearer")
    assert metric("tailrace_delivery_sockets") == 0


async def test_token_allows_only_sessions_of_its_own_tenant(stage: Stage, broker: Broker) -> None:
    await append(broker, "acme", story("g1"))
    async with socket(stage.url, additional_headers=bearer(token("acme", "read"))) as client:
        await client.say("subscribe", session="s", generation="g1")
        await client.hear("end")
        assert keys(client.events["s"]) == keys(story("g1"))
    async with socket(stage.url, additional_headers=bearer(token("other", "read"))) as client:
        answer = await client.ask("subscribe", id=1, session="s", generation="g1")
        assert answer["problem"]["status"] == 404


@pytest.mark.parametrize(
    ("scope", "message", "status"),
    [
        ("start", {"type_": "subscribe", "session": "s"}, 403),
        ("read", {"type_": "start", "session": "s", "request": BODY}, 403),
        ("read", {"type_": "cancel", "session": "s", "generation": "g1"}, 403),
        ("read", {"type_": "subscribe", "session": "elsewhere"}, 404),
        ("start", {"type_": "start", "session": "elsewhere", "request": BODY}, 404),
        ("cancel", {"type_": "cancel", "session": "elsewhere", "generation": "g1"}, 404),
    ],
)
async def test_every_message_needs_its_scope_and_session(
    stage: Stage, scope: str, message: dict[str, Any], status: int
) -> None:
    credential = token("acme", scope, sessions=["s"])
    async with socket(stage.url, additional_headers=bearer(credential)) as client:
        answer = await client.ask(**message, id="x")
        assert (answer["type"], answer["problem"]["status"]) == ("error", status)
        assert (await client.ask("ping", id=1))["type"] == "pong"


async def test_expired_credentials_end_the_socket_with_bye(stage: Stage, broker: Broker) -> None:
    await append(broker, "acme", story("g1")[:5])
    credential = token("acme", "read", exp=time.time() + 3)
    async with socket(stage.url, additional_headers=bearer(credential)) as client:
        await client.say("subscribe", session="s", from_="start")
        bye = await client.hear("bye")
        assert (bye["reason"], bye["cursor"]) == ("expired", client.cursors["s"][-1])
        assert (await client.closed())[0] == 4401


async def test_ticket_opens_a_socket_for_its_sessions(stage: Stage, broker: Broker) -> None:
    await append(broker, "acme", story("g1"))
    wish = {"sessions": ["s"], "scopes": ["read"]}
    made = await stage.http.post(f"{stage.url}/v1/tickets", json=wish, headers=bearer(token("acme", "read", "start")))
    assert made.status_code == 201, made.text
    async with socket(stage.url, query=f"?ticket={made.json()['ticket']}") as client:
        await client.say("subscribe", session="s", generation="g1")
        await client.hear("end")
        assert (await client.ask("subscribe", id=1, session="t"))["problem"]["status"] == 404
        assert (await client.ask("start", id=2, session="s", request=BODY))["problem"]["status"] == 403
    with pytest.raises(InvalidStatus) as refused:
        async with socket(stage.url, query="?ticket=made-up"):
            pass
    assert refusal(refused.value)[0] == 401


async def test_page_of_another_origin_cannot_open_a_socket_without_credentials(
    broker: Broker, nats_server: NatsServer
) -> None:
    async with delivering(nats_server.url) as stage:
        with pytest.raises(InvalidStatus) as refused:
            async with socket(stage.url, origin="https://elsewhere.example"):
                pass
        assert refusal(refused.value)[0] == 403
        async with socket(stage.url, origin=stage.url) as client:
            assert (await client.ask("ping", id=1))["type"] == "pong"
