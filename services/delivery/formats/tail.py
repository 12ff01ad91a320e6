"""Keep the newest accepted events of a session in memory: a tail of its log, bounded in bytes."""

from bisect import bisect_right
from typing import Final, NamedTuple

from schemas.acceptance import Acceptance
from schemas.events import TERMINAL_TYPES

__all__ = ["GAP", "Entry", "Positions", "Span", "Tail", "gap_before", "replay_start"]

GAP: Final = "gap"
"""Type of an entry that is not an event but the reason why events of its generation are missing."""


class Entry(NamedTuple):
    """One accepted event: ``seq`` is its stream sequence, ``data`` the stored bytes.

    A piece of text that ends inside an event has the stream sequence before that event; ``offset``: characters of the
    event included. ``moved``: the event is placed after events stored later. ``gap``: reason why events of this
    generation are missing before it; empty when none are.
    """

    seq: int
    generation: str
    type: str
    data: bytes
    offset: int = 0
    moved: bool = False
    gap: str = ""

    @property
    def terminal(self) -> bool:
        """Whether the event ends its generation."""
        return self.type in TERMINAL_TYPES


def gap_before(entry: Entry) -> Entry:
    """Return the gap entry placed directly before ``entry``."""
    if entry.moved:
        return Entry(entry.seq, entry.generation, GAP, entry.gap.encode())
    return Entry(entry.seq - 1, entry.generation, GAP, entry.gap.encode(), offset=1)


class Span(NamedTuple):
    """Range of a generation in the log: stream sequences of its first and last accepted event."""

    first: int
    last: int
    ended: bool


def replay_start(spans: dict[str, Span]) -> int | None:
    """Return the first stream sequence of a replay of the running or latest generation.

    A replay never begins in the middle of an answer: generations that overlap with it are included from their start.
    """
    if not spans:
        return None
    running = [span.first for span in spans.values() if not span.ended]
    start = min(running) if running else max(spans.values(), key=lambda span: span.last).first
    while True:
        earlier = [span.first for span in spans.values() if span.first < start <= span.last]
        if not earlier:
            return start
        start = min(earlier)


class Positions:
    """Keep the acceptance state of each generation of one session.

    At most ``limit`` ended generations are remembered; a running one is never forgotten.
    """

    def __init__(self, limit: int = 1_000) -> None:
        self._positions: dict[str, Acceptance] = {}
        self._limit = limit

    def knows(self, generation: str) -> bool:
        """Return whether the generation has an acceptance state."""
        return generation in self._positions

    def of(self, generation: str) -> Acceptance:
        """Return the acceptance state of a generation, a new one if there is none."""
        return self._positions.get(generation) or self.begin(generation, Acceptance())

    def begin(self, generation: str, acceptance: Acceptance) -> Acceptance:
        """Set and return the acceptance state of a generation."""
        self._positions[generation] = acceptance
        if len(self._positions) > self._limit:
            self._forget()
        return acceptance

    def begun(self) -> list[tuple[str, Acceptance]]:
        """Return the generations with accepted events, and their acceptance states."""
        return [(g, p) for g, p in self._positions.items() if p.begun]

    def _forget(self) -> None:
        ended = [g for g, p in self._positions.items() if p.ended]
        for generation in ended[: len(ended) // 2]:
            del self._positions[generation]


class Tail:
    """Keep the newest accepted events of a session, at most ``max_bytes`` of data (and always the last event).

    Entries have indices that never change; ``base`` is the index of the oldest one kept, ``end`` one past the newest.
    All accepted events with a stream sequence above ``floor`` are kept, and all pieces that end above it.
    """

    def __init__(self, floor: int, max_bytes: int) -> None:
        self.floor = floor
        self.base = 0
        self.bytes = 0
        self.spans: dict[str, Span] = {}
        self._entries: list[Entry] = []
        self._max_bytes = max_bytes

    @property
    def end(self) -> int:
        """One past the index of the newest entry."""
        return self.base + len(self._entries)

    def append(self, entry: Entry) -> None:
        """Add the newest entry, preceded by its gap if it has one; drop the oldest entries beyond the bound."""
        if entry.gap:
            self._entries.append(gap_before(entry))
            entry = entry._replace(gap="")
        self._entries.append(entry)
        self.bytes += len(entry.data)
        span = self.spans.get(entry.generation)
        if span is None:
            self.spans[entry.generation] = Span(entry.seq, entry.seq, entry.terminal)
        else:
            self.spans[entry.generation] = Span(span.first, entry.seq, span.ended or entry.terminal)
        if self.bytes > self._max_bytes and len(self._entries) > 1:
            self._shrink()

    def after(self, seq: int, offset: int = 0) -> int:
        """Return the index of the first entry that ends after a position (whose ``seq`` must be ≥ ``floor``)."""
        return self.base + bisect_right(self._entries, (seq, offset), key=_position)

    def restart(self, floor: int) -> None:
        """Drop all entries; the indices of current subscribers are then below ``base``."""
        self.base = self.end + 1
        self.floor = floor
        self.bytes = 0
        self.spans.clear()
        self._entries.clear()

    def slice(self, start: int, stop: int) -> list[Entry]:
        """Return entries by index; ``start`` must not be below ``base``."""
        return self._entries[start - self.base : stop - self.base]

    def _shrink(self) -> None:
        """Drop the oldest quarter at once, to amortise the cost over many events."""
        goal = self._max_bytes * 3 // 4
        drop = 0
        while self.bytes > goal and drop < len(self._entries) - 1:
            self.bytes -= len(self._entries[drop].data)
            drop += 1
        last = self._entries[drop - 1]
        self.floor = last.seq + (last.offset > 0)
        self.base += drop
        del self._entries[:drop]
        self.spans = {g: s for g, s in self.spans.items() if not s.ended or s.last > self.floor}


def _position(entry: Entry) -> tuple[int, int]:
    return entry.seq, entry.offset
