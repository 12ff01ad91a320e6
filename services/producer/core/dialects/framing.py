"""Split the body of an answer into events, by its format: server-sent events, or JSON documents."""

import json
from collections.abc import Callable
from typing import Final

from services.producer.core.dialects.leniency import loads
from services.producer.core.sse import MAX_EVENT_BYTES, STRAY, OversizedEvent, SseDecoder

__all__ = ["Framing", "documents"]

_BOM: Final = b"\xef\xbb\xbf"
_SPACE: Final = b" \t\r\n"
_HEAD: Final = 400
_decoder: Final = json.JSONDecoder(strict=False)
Events = list[tuple[bytes, bytes]]


class Framing:
    """Split one body. The first byte other than white space decides: a JSON document begins with a brace or bracket.

    ``feed`` takes bytes as they arrive and returns the (name, data) of each completed event; it may raise
    `OversizedEvent`. ``head``: the beginning of a body of JSON documents, empty for server-sent events.
    """

    __slots__ = ("_decoder", "_start", "feed")

    def __init__(self) -> None:
        self._start = b""
        self._decoder: SseDecoder | _Documents | None = None
        self.feed: Callable[[bytes], Events] = self._begin

    @property
    def head(self) -> bytes:
        """Return the beginning of a body of JSON documents."""
        return self._decoder.head if isinstance(self._decoder, _Documents) else b""

    def finish(self) -> Events:
        """Return the events held at the end of the body."""
        if self._decoder is None:
            return []
        return self._decoder.finish()

    def _begin(self, data: bytes) -> Events:
        start = (self._start + data).lstrip(_SPACE)
        if len(start) < len(_BOM) and _BOM.startswith(start):
            self._start = start
            return []
        start = start.removeprefix(_BOM).lstrip(_SPACE)
        if not start:
            self._start = b""
            return []
        self._decoder = _Documents() if start[:1] in b"{[" else SseDecoder()
        self.feed = self._decoder.feed
        return self.feed(start)


class _Documents:
    """Split JSON documents: on one line at once, on several lines at the end. Holds at most ``limit`` bytes."""

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self.head = b""
        self._limit = limit
        self._pieces: list[bytes] = []
        self._held = 0
        self._spans_lines = False

    def feed(self, data: bytes) -> Events:
        if len(self.head) < _HEAD:
            self.head += data[: _HEAD - len(self.head)]
        if self._spans_lines or b"\n" not in data:
            self._hold(data)
            return []
        *lines, rest = b"".join((*self._pieces, data)).split(b"\n")
        self._pieces.clear()
        self._held = 0
        events: Events = []
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            event = _line(line)
            if event is None:
                self._spans_lines = True
                rest = b"\n".join((*lines[number:], rest))
                break
            events.append(event)
        if rest:
            self._hold(rest)
        return events

    def finish(self) -> Events:
        held = b"".join(self._pieces)
        self._pieces.clear()
        return documents(held)

    def _hold(self, data: bytes) -> None:
        self._held += len(data)
        if self._held > self._limit:
            raise OversizedEvent(self._limit)
        self._pieces.append(data)


def documents(data: bytes) -> Events:
    """Return the JSON documents and lines of events in ``data``; other input is one `STRAY` at the end."""
    text = data.decode("utf-8", "replace").strip()
    events: Events = []
    while text:
        if text[0] in "{[" and not text.startswith("[DONE]"):
            try:
                _value, end = _decoder.raw_decode(text)
            except (ValueError, RecursionError):
                break
            events.append((b"", text[:end].encode()))
        else:
            line, _, _rest = text.partition("\n")
            event = _line(line.encode())
            if event is None:
                break
            end = len(line)
            events.append(event)
        text = text[end:].lstrip()
    if text:
        events.append((STRAY, text.encode()))
    return events


def _line(line: bytes) -> tuple[bytes, bytes] | None:
    """Return the event on a line, or ``None`` if the line is not a complete event."""
    line = line.strip()
    if line.startswith(b"data:"):
        return b"", line[5:].strip()
    if line == b"[DONE]":
        return b"", line
    if line[:1] not in b"{[" or line[-1:] not in b"}]":
        return None
    try:
        loads(line)
    except (ValueError, RecursionError):
        return None
    return b"", line
