"""Test bodies read before the application: bounded in size, time and sum, and not buffered without credentials."""

import asyncio
from typing import Any

import msgspec
import pytest

from services.kit import body_limit
from services.kit.auth.principal import PRINCIPAL
from services.kit.body_limit import reading_bodies
from services.kit.problem import Problem
from services.kit.request_head import BodyLimit, refused_body

LIMIT = BodyLimit(10, "TAILRACE_X_MAX_BODY")


class Client:
    """A client that sends pieces of a body and records the response."""

    def __init__(self, *pieces: bytes, ends: bool = True, leaves: bool = False) -> None:
        self._messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        if ends and self._messages:
            self._messages[-1]["more_body"] = False
        if leaves:
            self._messages.append({"type": "http.disconnect"})
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def left(self) -> int:
        return len(self._messages)

    def problem(self) -> dict[str, Any]:
        return msgspec.json.decode(self.sent[1]["body"], type=dict[str, Any])


async def read(client: Client, limit: BodyLimit = LIMIT, seconds: float = 5.0, **scope: Any) -> bytes | None:
    """Return the body as the application gets it; ``None`` when it was not called."""
    got: list[bytes] = []

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        got.append((await receive())["body"])

    given = {"type": "http", "method": "POST"} | scope
    await reading_bodies(app, limit, seconds)(given, client.receive, client.send)
    return got[0] if got else None


async def test_a_body_in_pieces_arrives_whole() -> None:
    assert await read(Client(b"ab", b"cd")) == b"abcd"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
async def test_a_body_beyond_the_limit_is_refused_with_the_limit_and_not_read_further(method: str) -> None:
    client = Client(b"x" * 8, b"x" * 8, b"x" * 8)
    assert await read(client, method=method) is None
    problem = client.problem()
    assert (problem["status"], problem["type"]) == (413, "urn:tailrace:problem:too-large")
    assert "10 bytes" in problem["detail"]
    assert "TAILRACE_X_MAX_BODY" in problem["detail"]
    assert client.left == 1


async def test_a_body_without_credentials_is_not_buffered() -> None:
    client = Client(b"x" * 8, b"x" * 8)
    assert await read(client, **{PRINCIPAL: Problem(401, "no")}) == b"x" * 8
    assert client.left == 1


async def test_a_body_that_never_ends_is_refused_after_its_time() -> None:
    client = Client(b"x", ends=False)
    assert await read(client, seconds=0.01) is None
    assert client.sent[0]["status"] == 408
    assert client.problem()["type"].endswith(":too-slow")


async def test_a_large_body_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "LEAST_RATE", 1)

    class Slow(Client):
        async def receive(self) -> dict[str, Any]:
            await asyncio.sleep(0.3)
            return await super().receive()

    assert await read(Slow(b"ab", b"cd", b"ef"), seconds=0.5) == b"abcdef"


async def test_a_body_that_is_broken_off_is_refused() -> None:
    client = Client(b"x", ends=False, leaves=True)
    assert await read(client) is None
    assert client.sent[0]["status"] == 400


async def test_the_sum_of_bodies_is_bounded_and_released() -> None:
    release = asyncio.Event()
    taken: list[bytes] = []

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        taken.append((await receive())["body"])
        await release.wait()

    reading = reading_bodies(app, LIMIT, total=20)
    scope = {"type": "http", "method": "POST"}
    clients = [Client(b"x" * 10) for _ in range(2)]
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(reading(scope, client.receive, client.send))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert taken == [b"x" * 10] * 2
        third = Client(b"x" * 10)
        await reading(scope, third.receive, third.send)
        assert third.sent[0]["status"] == 503
        cut_off = Client(b"", ends=False, leaves=True)
        await reading(scope, cut_off.receive, cut_off.send)
        release.set()
    again = Client(b"x" * 10)
    await reading(scope, again.receive, again.send)
    assert again.sent == []
    assert len(taken) == 3


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"content-length", b"10")], None),
        ([(b"content-length", b"11")], 413),
        ([(b"content-length", b"x")], 413),
        ([(b"content-encoding", b"identity")], None),
        ([(b"content-encoding", b"")], None),
        ([(b"content-encoding", b"Identity, identity")], None),
        ([(b"content-encoding", b"gzip")], 415),
        ([(b"content-encoding", b"identity"), (b"content-encoding", b"br")], 415),
    ],
)
def test_a_body_is_refused_by_its_announced_length_and_encoding(
    headers: list[tuple[bytes, bytes]], status: int | None
) -> None:
    refusal = refused_body({"headers": headers}, LIMIT)
    assert (refusal.status if refusal else None) == status
