"""A push decoder of server-sent events, after the WHATWG HTML standard, section 9.2.6.

It accepts bytes in any chunking and returns each event as soon as its blank line has arrived.
"""

from typing import Final

__all__ = ["COMMENT", "MAX_EVENT_BYTES", "STRAY", "OversizedEvent", "SseDecoder"]

MAX_EVENT_BYTES: Final = 16 * 1024 * 1024
"""Bound of one event: an image arrives as one event; large content is split before it is stored."""
COMMENT: Final = b"\n:"
"""The name under which a comment is reported; its data is the comment's text. No event can have it: it has a LF."""
STRAY: Final = b"\n?"
"""The name for input that the standard ignores: lines of an unknown field, joined with LF, or the name of an event
without data. Providers put errors there."""
_BOM: Final = b"\xef\xbb\xbf"
_WITHOUT_USE: Final = (b"id", b"retry")


class OversizedEvent(ValueError):
    """One event is longer than the bound; ``limit`` in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"one server-sent event is longer than {limit} bytes")


class SseDecoder:
    """Decode one stream. Keep no more than one unfinished event of at most ``limit`` bytes.

    Line ends (CRLF, CR, LF) are normalised to LF first, so that events can be split at blank lines.
    """

    __slots__ = ("_ends_line", "_held", "_limit", "_pieces", "_skip_lf", "_start")

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        self._held = 0
        self._ends_line = False
        self._skip_lf = False
        self._start: bytes | None = b""

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Return the (name, data) of every event that ``data`` completes; the name of an unnamed event is empty.

        Comments are reported in order under the name `COMMENT`, unknown lines of an event under `STRAY` before it. Data
        stays bytes, as JSON decoders expect.

        Raises:
            OversizedEvent: an event is longer than the limit.
        """
        if self._start is not None:
            data = self._without_bom(self._start + data)
        if self._skip_lf and data:
            self._skip_lf = False
            if data[0] == 0x0A:
                data = data[1:]
        if b"\r" in data:
            self._skip_lf = data[-1] == 0x0D
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if not data:
            return []
        return self._cut(data)

    def finish(self) -> list[tuple[bytes, bytes]]:
        """Return the events held at the end of the body, where the last blank line is missing."""
        held = b"".join((self._start or b"", *self._pieces))
        self._start = None
        self._pieces.clear()
        self._held = 0
        events: list[tuple[bytes, bytes]] = []
        if held:
            _parse(held, events)
        return events

    def _without_bom(self, data: bytes) -> bytes:
        if len(data) < len(_BOM) and _BOM.startswith(data):
            self._start = data
            return b""
        self._start = None
        return data.removeprefix(_BOM)

    def _cut(self, data: bytes) -> list[tuple[bytes, bytes]]:
        if b"\n\n" not in data and not (self._ends_line and data[0] == 0x0A):
            self._hold(data)
            return []
        if self._pieces:
            data = b"".join((*self._pieces, data))
            self._pieces.clear()
            self._held = 0
        # Nearly always each event is one line and every second line is empty: cutting at single bytes costs half of it.
        lines = data.split(b"\n")
        blocks = data.split(b"\n\n") if len(lines) % 2 == 0 or any(lines[1::2]) else lines[::2]
        rest = blocks.pop()
        if len(data) > self._limit and max(map(len, blocks)) > self._limit:
            raise OversizedEvent(self._limit)
        self._ends_line = False
        if rest:
            self._hold(rest)
        events: list[tuple[bytes, bytes]] = []
        for block in blocks:
            if block[:6] == b"data: " and b"\n" not in block:
                events.append((b"", block[6:]))
            elif block:
                _parse(block, events)
        return events

    def _hold(self, data: bytes) -> None:
        self._held += len(data)
        if self._held > self._limit:
            raise OversizedEvent(self._limit)
        self._pieces.append(data)
        self._ends_line = data[-1] == 0x0A


def _parse(block: bytes, events: list[tuple[bytes, bytes]]) -> None:
    name = b""
    data: list[bytes] = []
    stray: list[bytes] = []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
        elif field in _WITHOUT_USE:
            pass
        elif field:
            stray.append(line)
        elif line:
            events.append((COMMENT, value))
    if name and not data:
        stray.append(b"event: " + name)
    if stray:
        events.append((STRAY, b"\n".join(stray)))
    if data:
        events.append((name, b"\n".join(data)))
