"""How a stream is asked for and read, protocol by protocol; no input or output of its own."""

from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from bench.wire import MalformedResponse, Response, request

__all__ = ["PROTOCOLS", "Arrived", "Dialect", "MalformedResponse", "Stream"]


class Arrived(NamedTuple):
    """An event: its cursor and its bytes."""

    cursor: bytes
    data: bytes


class Stream(Protocol):
    """One answer while it arrives. ``status`` is set once its head is there."""

    status: int | None

    def feed(self, data: bytes) -> list[Arrived]:
        """Take what one read gave and return the events that it completed.

        Raises:
            MalformedResponse: this is not the protocol.
        """
        ...


class Dialect(NamedTuple):
    """What is sent first (for a session, behind a cursor, else from its answer's beginning or only what is new), and
    what reads the answer.
    """

    call: Callable[[str, bytes, bool], bytes]
    stream: Callable[[], Stream]


class EventStream:
    """Server-sent events."""

    def __init__(self) -> None:
        self.status: int | None = None
        self._response = Response()

    def feed(self, data: bytes) -> list[Arrived]:
        """Take what one read gave; comments and named events are left out.

        Raises:
            MalformedResponse: this is not HTTP.
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
    "nchan-sse": Dialect(_nchan, EventStream),
}
