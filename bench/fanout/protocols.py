"""Request and parse a stream in each protocol; no I/O."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from bench.wire import MalformedResponse, Response, request

__all__ = ["PROTOCOLS", "Arrived", "Dialect", "MalformedResponse", "Stream"]


class Arrived(NamedTuple):
    """An event: its cursor and its bytes."""

    cursor: bytes
    data: bytes


class Stream(Protocol):
    """One response while it arrives.

    ``status`` is set once its head has arrived (200: accepted). ``replies``: data to send to the server; the sender
    clears it.
    """

    status: int | None
    replies: bytes

    def feed(self, data: bytes) -> list[Arrived]:
        """Add the data of one read; return the events that it completes.

        Raises:
            MalformedResponse: the data does not follow the protocol.
        """
        ...


class Dialect(NamedTuple):
    """The request and the parser of a protocol, for a session: after a cursor, else from the answer's beginning or only
    live.

    ``counts``: events can be counted in the stream's bytes; otherwise every subscriber reads everything.
    """

    call: Callable[[str, bytes, bool], bytes]
    stream: Callable[[str, bytes, bool], Stream]
    counts: bool = True


class EventStream:
    """Server-sent events."""

    def __init__(self, _session: str, _cursor: bytes, _live: bool) -> None:
        self.status: int | None = None
        self.replies = b""
        self._response = Response()

    def feed(self, data: bytes) -> list[Arrived]:
        """Add the data of one read; skip comments and named events.

        Raises:
            MalformedResponse: the data is not HTTP.
        """
        blocks = self._response.feed(data)
        self.status = self._response.status
        found = []
        for block in blocks:
            start = block.find(b"data: ")
            if start < 0 or block.startswith(b"event:") or block.find(b"\nevent:", 0, start) >= 0:
                continue
            cursor = block[4 : block.find(b"\n")] if block.startswith(b"id: ") else b""
            found.append(Arrived(cursor, block[start + 6 :]))
        return found


class _Event(msgspec.Struct):
    cursor: str
    event: msgspec.Raw


class _Message(msgspec.Struct):
    type: str
    id: int = 0
    events: list[_Event] = []


class SocketStream:
    """A WebSocket: the handshake response and then messages in JSON."""

    def __init__(self, session: str, cursor: bytes, live: bool) -> None:
        self.status: int | None = None
        self.replies = b""
        wish = {"type": "subscribe", "session": session, "after": cursor.decode() or None, "from": _FROM[live]}
        self._hello = frame({name: value for name, value in wish.items() if value})
        self._rest = b""

    def feed(self, data: bytes) -> list[Arrived]:
        """Add the data of one read.

        Raises:
            MalformedResponse: the data is not a WebSocket's.
        """
        data = self._rest + data
        if self.status is None:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._rest = data
                return []
            switched = data.startswith(b"HTTP/1.1 101")
            self.status, self.replies = (200, self._hello) if switched else (int(data[9:12]), b"")
            data = data[end + 4 :] if switched else b""
        found: list[Arrived] = []
        while (span := _payload(data)) and span.stop <= len(data):
            found += self._hear(data[span.start : span.stop])
            data = data[span.stop :]
        self._rest = data
        return found

    def _hear(self, payload: bytes) -> list[Arrived]:
        message = _message(payload)
        if message.type == "ping":
            self.replies += frame({"type": "pong", "id": message.id})
        if message.type in ("error", "bye", "end"):
            raise MalformedResponse(f"told {payload[:200]!r}")
        return [Arrived(each.cursor.encode(), bytes(each.event)) for each in message.events]


_FROM: Final = {True: "live", False: None}
_message = msgspec.json.Decoder(_Message).decode


def frame(message: dict[str, Any]) -> bytes:
    """Return a client's text frame of at most 125 bytes or 64 KB, with a zero mask that leaves the text unchanged."""
    data = msgspec.json.encode(message)
    length = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2, "big")
    return b"\x81" + length + b"\0\0\0\0" + data


def _payload(data: bytes) -> slice | None:
    """Return the slice of the first frame's payload (it may end beyond ``data``), or ``None`` without a header."""
    if len(data) < 2:
        return None
    length, start = data[1] & 0x7F, 2
    if length >= 126:
        size = 2 if length == 126 else 8
        start += size
        if len(data) < start:
            return None
        length = int.from_bytes(data[2:start], "big")
    return slice(start, start + length)


def _socket(_session: str, _cursor: bytes, _live: bool) -> bytes:
    headers = {"upgrade": "websocket", "connection": "Upgrade", "sec-websocket-version": "13"}
    key = {"sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==", "sec-websocket-protocol": "tailrace.v1.json"}
    return request("GET", "/v1/ws", "127.0.0.1", headers | key)


def _get(path: str, cursor: bytes) -> bytes:
    headers = {"accept": "text/event-stream"}
    if cursor:
        headers["last-event-id"] = cursor.decode("latin-1")
    return request("GET", path, "127.0.0.1", headers)


def _native(session: str, cursor: bytes, live: bool) -> bytes:
    return _get(f"/v1/sessions/{session}/events{'?from=live' if live else ''}", cursor)


def _nchan(session: str, cursor: bytes, _live: bool) -> bytes:
    return _get(f"/subscribe?id={session}", cursor)


PROTOCOLS: Final = {
    "sse": Dialect(_native, EventStream),
    "websocket": Dialect(_socket, SocketStream, counts=False),
    "nchan-sse": Dialect(_nchan, EventStream),
}
