"""Frames of a feed: each event is encoded once for a dialect, whatever the number of subscribers."""

from collections.abc import Callable

from services.delivery.core.entries import Entry, Tail

__all__ = ["Chunk", "Frames", "Framing"]

Framing = Callable[[Entry, bytes], bytes]


class Chunk:
    """What one write brings: frames joined, the index after them, and whether the wanted generation ends with them."""

    __slots__ = ("count", "data", "ends", "last_seq", "message", "stop")

    def __init__(self, data: bytes, count: int, stop: int, last_seq: int, ends: bool) -> None:
        self.data = data
        self.count = count
        self.stop = stop
        self.last_seq = last_seq
        self.ends = ends
        self.message = {"type": "http.response.body", "body": data, "more_body": not ends}


class Frames:
    """The frames of a tail in one dialect, made when first wanted."""

    def __init__(self, tail: Tail, framing: Framing, prefix: bytes) -> None:
        self._tail = tail
        self._framing = framing
        self._prefix = prefix
        self._frames: list[bytes] = []
        self._base = tail.base

    def chunk(self, start: int, generation: str | None, max_bytes: int) -> Chunk:
        """Return what a subscriber at index ``start`` is to get next, of one generation or of all.

        The chunk ends behind ``max_bytes`` (of stored data) or with the terminal of the wanted generation.
        """
        self._follow()
        entries = self._tail.slice(start, self._tail.end)
        parts: list[bytes] = []
        size = 0
        stop, last, ends = start, 0, False
        for offset, entry in enumerate(entries, start):
            stop, last = offset + 1, entry.seq
            if generation is not None and entry.generation != generation:
                continue
            frame = self._frames[offset - self._base]
            parts.append(frame)
            size += len(frame)
            if generation is not None and entry.terminal:
                ends = True
                break
            if size >= max_bytes:
                break
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return Chunk(data, len(parts), stop, last, ends)

    def _follow(self) -> None:
        tail = self._tail
        if self._base < tail.base:
            del self._frames[: tail.base - self._base]
            self._base = tail.base
        known = self._base + len(self._frames)
        if known < tail.end:
            framing, prefix = self._framing, self._prefix
            self._frames += [framing(entry, prefix) for entry in tail.slice(known, tail.end)]
