"""One subscriber's connection: time each read, follow the text, and detect every difference."""

import asyncio
import time
from array import array
from collections.abc import Callable
from typing import Any, Final, cast

import msgspec

from bench.relay.scenarios import StreamOrder
from bench.text import boundaries, tokens
from bench.wire import MalformedResponse, Response

__all__ = ["Expected", "Harvest", "Parser", "Reader", "native", "openai"]

PROBLEMS: Final = 10
Parser = Callable[[bytes], tuple[str | None, str | None]]
TERMINALS: Final = frozenset({"completed", "failed", "cancelled", "interrupted"})


class _Native(msgspec.Struct):
    type: str
    text: str | None = None
    code: str | None = None
    message: str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _OpenAI(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


_native = msgspec.json.Decoder(_Native).decode
_openai = msgspec.json.Decoder(_OpenAI).decode


def native(block: bytes) -> tuple[str | None, str | None]:
    """Return text and end of an event of the session's log; each may be ``None``."""
    start = block.find(b"data: ")
    if start < 0 or block.startswith(b"event:") or block.find(b"\nevent:", 0, start) >= 0:
        return None, None
    event = _native(block[start + 6 :])
    if event.type == "delta":
        return event.text, None
    if event.type in TERMINALS:
        return None, event.type if event.type == "completed" else f"{event.type}: {event.code} {event.message}"
    return None, "restarted" if event.type == "restarted" else None


def openai(block: bytes) -> tuple[str | None, str | None]:
    """Return text and end of a chunk of an OpenAI chat completion; each may be ``None``."""
    if not block.startswith(b"data: "):
        return None, None
    if block == b"data: [DONE]":
        return None, "completed"
    chunk = _openai(block[6:])
    if chunk.error is not None:
        return None, f"error: {chunk.error}"
    return (chunk.choices[0].delta.content or None) if chunk.choices else None, None


class Expected:
    """The expected text of a stream, and the end of each token in it."""

    def __init__(self, order: StreamOrder, cells: memoryview) -> None:
        pieces = tokens(order.stream, order.tokens)
        self.text = "".join(pieces)
        self.ends = boundaries(pieces)
        self.stamps = cells[order.cell : order.cell + order.tokens]


class Harvest:
    """Results of all readers of a process; latencies in nanoseconds."""

    def __init__(self) -> None:
        self.latencies: array[int] = array("q")
        self.events = self.reads = self.bytes = 0
        self.complete = self.mismatches = self.reconnects = 0
        self.last_ns = 0
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        """Record a problem; only the first few are kept."""
        if len(self.problems) < PROBLEMS:
            self.problems.append(text)

    def finish(self, order: StreamOrder, reader: "Reader") -> None:
        """Check a reader that has ended."""
        want = len(reader.expected.text)
        if reader.ended == "completed" and reader.position == want and not reader.differs:
            self.complete += 1
            return
        if reader.differs:
            self.mismatches += 1
        head = f"stream {order.stream}: status {reader.response.status}, {reader.position} of {want} characters"
        self.problem(f"{head}, ended by {reader.ended or 'a closed connection'}{reader.differs}")


class Reader(asyncio.Protocol):
    """Read one response. ``closed`` is set at its end; ``cursor`` is the last event's id."""

    def __init__(self, expected: Expected, harvest: Harvest, parse: Parser, call: bytes) -> None:
        self.expected = expected
        self.harvest = harvest
        self.response = Response()
        self.headed = asyncio.Event()
        self.closed = asyncio.Event()
        self.ended: str | None = None
        self.position = 0
        self.token = 0
        self.differs = ""
        self.cursor = b""
        self._parse = parse
        self._call = call

    def again(self, headers: dict[str, str]) -> "Reader":
        """Return a reader that continues after this one's last event."""
        line, _, rest = self._call.partition(b"\r\n")
        call = line + b"\r\nlast-event-id: " + self.cursor + b"\r\n" + rest
        reader = Reader(self.expected, self.harvest, self._parse, call)
        reader.position, reader.token, reader.differs = self.position, self.token, self.differs
        return reader

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transport does not inherit from it
        self._transport.write(self._call)

    def data_received(self, data: bytes) -> None:
        """Take the time first, then parse the data."""
        now = time.monotonic_ns()
        harvest = self.harvest
        harvest.reads += 1
        harvest.bytes += len(data)
        try:
            blocks = self.response.feed(data)
            for block in blocks:
                text, end = self._parse(block)
                if text:
                    harvest.events += 1
                    self._take(text, now)
                if end:
                    self.ended = end
        except (MalformedResponse, msgspec.DecodeError) as error:
            self.differs = f"; unreadable: {error}"
            self._transport.abort()
            return
        if blocks:
            self._remember(blocks[-1])
        if self.response.status is not None and not self.headed.is_set():
            self._judge_head()
        if self.response.ended or self.ended:
            self._transport.close()
            self.closed.set()

    def connection_lost(self, error: Exception | None) -> None:
        """Mark the reader as closed."""
        self.headed.set()
        self.closed.set()

    def _take(self, text: str, now: int) -> None:
        expected = self.expected
        if not expected.text.startswith(text, self.position):
            wanted = expected.text[self.position : self.position + len(text)]
            self.differs = self.differs or f"; at {self.position} {text[:40]!r} instead of {wanted[:40]!r}"
        self.position += len(text)
        ends, stamps, take = expected.ends, expected.stamps, self.harvest.latencies.append
        token, position = self.token, self.position
        while token < len(ends) and ends[token] <= position:
            take(now - stamps[token])
            token += 1
        self.token = token
        self.harvest.last_ns = now

    def _remember(self, block: bytes) -> None:
        if block.startswith(b"id: "):
            self.cursor = block[4 : block.find(b"\n")]

    def _judge_head(self) -> None:
        self.headed.set()
        if self.response.status != 200:
            self._transport.close()
            self.closed.set()
