"""The wire form of responses: chunks and frames encoded once for all recipients, and the ``send`` that writes them."""

from collections.abc import Callable
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

__all__ = ["CHUNKS", "FRAMES", "Framing", "Sender"]


class Framing:
    """The wire form of a message, encoded once for all connections that receive it."""

    __slots__ = ("_framed", "_make", "_message")

    def __init__(self, make: Callable[[Any], bytes]) -> None:
        self._make = make
        self._message: Any = None
        self._framed = b""

    def of(self, message: Any) -> bytes:
        """Return a message's bytes."""
        if message is not self._message:
            self._framed = self._make(message)
            self._message = message
        return self._framed


def _chunk(message: Any) -> bytes:
    body = message["body"]
    return b"%x\r\n%b\r\n" % (len(body), body) if body else b""  # an empty chunk would be the end


def _frame(message: Any) -> bytes:
    """Encode a message as one frame of a WebSocket (RFC 6455, 5.2), unmasked, as servers send it."""
    text = message.get("text")
    kind, payload = (b"\x82", message["bytes"]) if text is None else (b"\x81", text.encode())
    size = len(payload)
    if size < 126:
        return b"%b%c%b" % (kind, size, payload)
    if size < 65_536:
        return b"%b\x7e%b%b" % (kind, size.to_bytes(2), payload)
    return b"%b\x7f%b%b" % (kind, size.to_bytes(8), payload)


CHUNKS: Final = Framing(_chunk)
FRAMES: Final = Framing(_frame)


class Sender:
    """The ``send`` of a response. The pieces of a stream take a fast path, everything else uvicorn's.

    ``is_open``: a stream is in progress, and its client reads. ``unread`` is called before the end of a response whose
    request has not been read to its end.
    """

    __slots__ = ("_cycle", "_unread", "_until_closed", "_write", "is_open")

    def __init__(self, cycle: RequestResponseCycle, unread: Callable[[RequestResponseCycle], None]) -> None:
        self._cycle = cycle
        self._unread = unread
        self._write = cycle.transport.write
        self._until_closed = False
        self.is_open = False

    def offer(self, message: Any) -> bool:
        """Write a piece of a stream; return whether it could be written at once. The last piece never is.

        The same message object must mean the same piece for all streams.
        """
        if self.is_open and message["more_body"]:
            self._write(CHUNKS.of(message))
            return True
        return False

    async def __call__(self, message: Any) -> None:
        """Send an ASGI message; wait while the client does not read.

        Raises:
            ConnectionResetError: the client is gone.
        """
        cycle = self._cycle
        if cycle.chunked_encoding and message.get("more_body") and message.get("body"):
            if cycle.flow.write_paused:
                await cycle.flow.drain()
            if cycle.disconnected:
                raise ConnectionResetError("the client is gone")
            self._write(CHUNKS.of(message))
            self.is_open = not cycle.flow.write_paused
            return
        self.is_open = False
        if cycle.scope["http_version"] == "1.0":
            self._frame_for_http_1_0(message)
        if cycle.more_body and not message.get("more_body") and message["type"] == "http.response.body":
            self._unread(cycle)
        await cycle.send(message)

    def _frame_for_http_1_0(self, message: Any) -> None:
        """HTTP/1.0 has no chunks: a response of unknown length ends with the connection."""
        cycle = self._cycle
        if message["type"] == "http.response.start":
            self._until_closed = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            cycle.chunked_encoding = False if self._until_closed else None
        elif self._until_closed and cycle.scope["method"] != "HEAD":
            cycle.expected_content_length = len(message.get("body", b""))
