"""Bodies read before they are answered: bounded in size and time, and not kept for strangers."""

import asyncio
from typing import Any

import msgspec
import pytest

from services.kit.auth.principal import PRINCIPAL
from services.kit.bodies import reading_bodies
from services.kit.problem import Problem


class Client:
    """Sends pieces of a body, then nothing more; keeps what is answered."""

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


async def read(client: Client, max_body: int = 10, seconds: float = 5.0, **scope: Any) -> bytes | None:
    """Return the body as the application gets it; ``None`` when it was not called."""
    got: list[bytes] = []

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        got.append((await receive())["body"])

    given = {"type": "http", "method": "POST"} | scope
    await reading_bodies(app, max_body, seconds)(given, client.receive, client.send)
    return got[0] if got else None


async def test_a_body_in_pieces_arrives_whole() -> None:
    assert await read(Client(b"ab", b"cd")) == b"abcd"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
async def test_of_what_is_too_large_one_byte_too_much_is_kept(method: str) -> None:
    assert await read(Client(b"x" * 8, b"x" * 8, b"x" * 8), method=method) == b"x" * 11


async def test_of_a_strangers_body_a_byte_is_kept() -> None:
    assert await read(Client(b"x" * 8, b"x" * 8), **{PRINCIPAL: Problem(401, "no")}) == b"x"


async def test_a_body_that_never_ends_is_refused_after_its_time() -> None:
    client = Client(b"x", ends=False)
    assert await read(client, seconds=0.01) is None
    assert client.sent[0]["status"] == 408
    assert msgspec.json.decode(client.sent[1]["body"])["type"].endswith(":too-slow")


async def test_a_body_that_is_broken_off_is_refused() -> None:
    client = Client(b"x", ends=False, leaves=True)
    assert await read(client) is None
    assert client.sent[0]["status"] == 400
