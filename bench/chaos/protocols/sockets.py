"""WebSockets, with an independent client."""

import asyncio
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from bench.chaos.history import Got
from bench.chaos.pace import slow_for
from bench.chaos.protocols.wanted import SILENCE, Refused, Wanted

__all__ = ["read_socket"]


class _Item(msgspec.Struct):
    cursor: str
    event: msgspec.Raw


class _Problem(msgspec.Struct):
    status: int
    detail: str = ""


class _Message(msgspec.Struct):
    type: str
    id: Any = None
    reason: str = ""
    events: list[_Item] = []
    problem: _Problem | None = None


async def read_socket(wanted: Wanted) -> None:
    """Read one subscription until it ends, or all expected events have arrived."""
    address = wanted.url.replace("http://", "ws://") + "/v1/ws"
    try:
        async with connect(
            address,
            subprotocols=[Subprotocol("tailrace.v1.json")],
            additional_headers=wanted.headers,
            open_timeout=3,
            close_timeout=1,
            max_size=1 << 24,
            proxy=None,
        ) as socket:
            await _subscribe(socket, wanted)
            while not wanted.there():
                async with asyncio.timeout(slow_for(SILENCE)):
                    text = await socket.recv()
                message = msgspec.json.decode(text, type=_Message)
                if await _take(socket, wanted, message):
                    return
    except InvalidStatus as error:
        raise Refused(error.response.status_code, error.response.body.decode("utf-8", "replace")) from error


async def _subscribe(socket: ClientConnection, wanted: Wanted) -> None:
    asked: dict[str, Any] = {"type": "subscribe", "session": wanted.session}
    if wanted.generation is not None:
        asked["generation"] = wanted.generation
    if wanted.cursor is not None:
        asked["after"] = wanted.cursor
    elif wanted.generation is None:
        asked["from"] = "start"
    if wanted.window is not None:
        asked["credit"] = {"events": wanted.window}
    await socket.send(msgspec.json.encode(asked).decode())


async def _take(socket: ClientConnection, wanted: Wanted, message: _Message) -> bool:
    """Handle one message; return whether it was the last one."""
    match message.type:
        case "subscribed":
            wanted.opened(200)
        case "events":
            for item in message.events:
                wanted.got(Got(watch=-1, cursor=item.cursor, data=bytes(item.event).decode()))
            if wanted.window is not None:
                credit = {"type": "credit", "session": wanted.session, "events": len(message.events)}
                await socket.send(msgspec.json.encode(credit).decode())
        case "ping":
            await socket.send(msgspec.json.encode({"type": "pong", "id": message.id}).decode())
        case "error":
            problem = message.problem or _Problem(500)
            raise Refused(problem.status, problem.detail)
        case "end":
            if message.reason == "complete":
                wanted.over()
            return True
        case "bye":
            wanted.said("bye", message.reason)
            return True
        case _:
            wanted.said(message.type, message.reason)
    return False
