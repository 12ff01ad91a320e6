"""Encode each event of a feed once for a format, whatever the number of subscribers."""

import sys
from typing import Final

from services.delivery.formats.format import Address, Format
from services.delivery.formats.tail import GAP, Entry, Tail

__all__ = ["UNLIMITED", "Chunk", "Frames"]

UNLIMITED: Final = sys.maxsize


class Chunk:
    """Content of one write: its message, the index after it, and whether the requested generation ends with it.

    ``count`` events of ``size`` bytes; ``last_seq``: the stream sequence up to which it serves the subscriber;
    ``offset``: characters of the next event.
    """

    __slots__ = ("count", "ends", "last_seq", "message", "offset", "size", "stop")

    def __init__(
        self, message: object, count: int, size: int, stop: int, last_seq: int, ends: bool, offset: int = 0
    ) -> None:
        self.message = message
        self.count = count
        self.size = size
        self.stop = stop
        self.last_seq = last_seq
        self.offset = offset
        self.ends = ends


class Frames:
    """Cache the frames of a tail in one format, encoded on first use."""

    def __init__(self, tail: Tail, format_: Format, at: Address) -> None:
        self._tail = tail
        self._format = format_
        self._at = at
        self._frames: list[bytes] = []
        self._base = tail.base

    def chunk(self, start: int, generation: str | None, max_bytes: int, max_events: int = UNLIMITED) -> Chunk:
        """Return the next chunk for a subscriber at index ``start``, of one generation or of all.

        The chunk ends with the event that reaches ``max_bytes``, after ``max_events`` (at least 1), or with the
        terminal of the requested generation.
        """
        self._follow()
        entries = self._tail.slice(start, self._tail.end)
        parts: list[bytes] = []
        size = count = 0
        stop, last, within, ends = start, 0, 0, False
        for offset, entry in enumerate(entries, start):
            if count >= max_events:
                break
            stop, last, within = offset + 1, entry.seq, entry.offset
            if generation is not None and entry.generation != generation:
                if entry.type == GAP:
                    within = 0
                continue
            frame = self._frames[offset - self._base]
            parts.append(frame)
            if entry.type == GAP:  # not an event: not counted, and sent again to a client that resumes here
                within = 0
                continue
            count += 1
            size += len(frame)
            if generation is not None and entry.terminal:
                ends = True
                break
            if size >= max_bytes:
                break
        message = self._format.message(parts, ends=ends) if parts else None
        return Chunk(message, count, size, stop, last, ends, within)

    def _follow(self) -> None:
        tail = self._tail
        if self._base < tail.base:
            del self._frames[: tail.base - self._base]
            self._base = tail.base
        known = self._base + len(self._frames)
        if known < tail.end:
            frame, at = self._format.frame, self._at
            self._frames += [
                frame(entry, at) if entry.type != GAP else self._gap(entry) for entry in tail.slice(known, tail.end)
            ]

    def _gap(self, entry: Entry) -> bytes:
        return self._format.gap(entry.data.decode(), entry.generation, self._at)
