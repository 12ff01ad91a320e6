"""Test credentials of WebSockets: headers, tickets, the rights of a ticket, and key revocation."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from services.kit.jetstream.broker import Broker
from tests.support.credentials import ADMIN, bearer, guarded, make_key, token
from tests.support.delivery_server import Stage

EXPIRED = 4401


@pytest.fixture
async def stage(broker: Broker, nats_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    async with guarded(nats_url, tmp_path) as running:
        yield running


def socket(stage: Stage, credential: str | None = None, **query: str) -> connect:
    address = stage.url.replace("http://", "ws://") + "/v1/ws"
    if query:
        address += "?" + "&".join(f"{name}={value}" for name, value in query.items())
    return connect(address, additional_headers=bearer(credential) if credential else {}, proxy=None)


async def ticket(stage: Stage, credential: str, *scopes: str) -> str:
    wish = {"sessions": ["s"], "scopes": scopes}
    answer = await stage.http.post(f"{stage.url}/v1/tickets", json=wish, headers=bearer(credential))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["ticket"])


async def said(connection: ClientConnection, *kinds: str) -> dict[str, Any]:
    """Return the next message of these types."""
    async with asyncio.timeout(10):
        while True:
            message: dict[str, Any] = json.loads(await connection.recv())
            if message["type"] in kinds:
                return message


async def closed(connection: ClientConnection) -> int:
    """Read to the end and return the code that it was closed with."""
    async with asyncio.timeout(15):
        await connection.wait_closed()
    assert connection.close_code is not None
    return connection.close_code


@pytest.mark.parametrize("query", [{}, {"ticket": "nonsense"}, {"ticket": ""}, {"token": "x"}])
async def test_without_a_credential_no_socket_is_opened(stage: Stage, query: dict[str, str]) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with socket(stage, **query):
            pass
    assert refused.value.response.status_code == 401


async def test_a_key_itself_is_no_ticket(stage: Stage) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with socket(stage, ticket=ADMIN.text):
            pass
    assert refused.value.response.status_code == 401


async def test_a_ticket_opens_a_socket_for_its_sessions_and_scopes(stage: Stage) -> None:
    shown = await ticket(stage, token("acme", "read", "start"), "read")
    async with socket(stage, ticket=shown) as connection:
        await connection.send(json.dumps({"type": "subscribe", "id": 1, "session": "s"}))
        assert (await said(connection, "subscribed", "error"))["type"] == "subscribed"
        await connection.send(json.dumps({"type": "subscribe", "id": 2, "session": "other"}))
        assert (await said(connection, "subscribed", "error"))["problem"]["status"] == 404
        wish = {"model": "scripted/story", "messages": [{"role": "user", "content": "x"}]}
        await connection.send(json.dumps({"type": "start", "id": 3, "session": "s", "request": wish}))
        assert (await said(connection, "started", "accepted", "error"))["problem"]["status"] == 403


async def test_a_socket_ends_when_its_key_is_revoked(stage: Stage) -> None:
    made = await make_key(stage, "read")
    async with socket(stage, made["key"]) as connection:
        await connection.send(json.dumps({"type": "subscribe", "session": "s"}))
        await said(connection, "subscribed")
        await stage.http.delete(f"{stage.url}/v1/keys/{made['id']}", headers=bearer(ADMIN.text))
        assert await closed(connection) == EXPIRED


async def test_a_socket_opened_with_a_ticket_ends_when_the_key_behind_it_is_revoked(stage: Stage) -> None:
    made = await make_key(stage, "read")
    async with socket(stage, ticket=await ticket(stage, made["key"], "read")) as connection:
        await stage.http.delete(f"{stage.url}/v1/keys/{made['id']}", headers=bearer(ADMIN.text))
        assert await closed(connection) == EXPIRED


async def test_a_socket_ends_when_its_token_expires(stage: Stage) -> None:
    async with socket(stage, token("acme", "read", exp=time.time() + 2)) as connection:
        assert await closed(connection) == EXPIRED


async def test_sockets_are_counted_with_the_streams(broker: Broker, nats_url: str, tmp_path: Path) -> None:
    async with guarded(nats_url, tmp_path, streams_per_tenant=1) as stage:
        credential = token("acme", "read")
        async with socket(stage, credential):
            with pytest.raises(InvalidStatus) as refused:
                async with socket(stage, credential):
                    pass
            assert refused.value.response.status_code == 429
            assert "retry-after" in refused.value.response.headers
