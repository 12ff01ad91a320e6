"""A client of Tailrace's WebSockets, in JSON or MessagePack, that answers pings as the protocol requires."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

SILENCE = 8.0  # seconds without a message after which a test fails

JSON = "tailrace.v1.json"
MSGPACK = "tailrace.v1.msgpack"


class SocketClient:
    """One open socket. ``pongs``: whether pings are answered."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.binary = connection.subprotocol == MSGPACK
        self.pongs = True
        self.pings = 0
        self.cursors: dict[str, list[str]] = {}
        self.events: dict[str, list[dict[str, Any]]] = {}

    async def say(self, type_: str, **fields: Any) -> None:
        """Send one message."""
        message = {"type": type_} | {name.rstrip("_"): value for name, value in fields.items()}
        if self.binary:
            await self.connection.send(msgspec.msgpack.encode(message))
        else:
            await self.connection.send(json.dumps(message))

    async def hear(self, type_: str | None = None) -> dict[str, Any]:
        """Return the next message, or the next of one type; events on the way are kept."""
        while True:
            async with asyncio.timeout(SILENCE):
                data = await self.connection.recv()
            assert isinstance(data, bytes) == self.binary, f"a frame of the wrong kind: {data[:80]!r}"
            message = msgspec.msgpack.decode(data) if isinstance(data, bytes) else json.loads(data)
            if message["type"] == "ping":
                self.pings += 1
                if self.pongs:
                    await self.say("pong", id=message["id"])
                if type_ != "ping":
                    continue
            if message["type"] == "events":
                self._keep(message)
            if type_ is None or message["type"] == type_:
                return message

    async def ask(self, type_: str, **fields: Any) -> dict[str, Any]:
        """Send one message and return the answer to it, by its ``id``."""
        await self.say(type_, **fields)
        while True:
            message = await self.hear()
            if message.get("id") == fields["id"]:
                return message

    async def gather(self, session: str, count: int) -> list[dict[str, Any]]:
        """Read until so many events of a session have come in all; return them."""
        while len(self.events.get(session, [])) < count:
            message = await self.hear()
            assert message["type"] in ("events", "subscribed", "pong"), message
        return self.events[session]

    async def closed(self) -> tuple[int, str]:
        """Read to the end; return how the server closed the socket."""
        with pytest.raises(ConnectionClosed) as end:
            await self._hear_on()
        assert end.value.rcvd is not None, "the connection broke without a close frame"
        return end.value.rcvd.code, end.value.rcvd.reason

    async def _hear_on(self) -> None:
        while True:
            await self.hear()

    def _keep(self, message: dict[str, Any]) -> None:
        session = message["session"]
        for item in message["events"]:
            self.cursors.setdefault(session, []).append(item["cursor"])
            self.events.setdefault(session, []).append(item["event"])


@contextlib.asynccontextmanager
async def socket(
    url: str, subprotocol: str | None = JSON, query: str = "", **options: Any
) -> AsyncIterator[SocketClient]:
    """Connect to the service at ``url`` (``http://…``) while the block runs."""
    address = url.replace("http", "ws", 1) + "/v1/ws" + query
    offered = None if subprotocol is None else [subprotocol]
    async with connect(address, subprotocols=offered, max_size=None, **options) as connection:
        yield SocketClient(connection)
