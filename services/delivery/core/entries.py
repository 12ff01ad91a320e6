"""Accepted events as a feed keeps them: a tail of the session's log, bounded in bytes."""

from bisect import bisect_right
from typing import NamedTuple

from schemas.acceptance import BEGINNING, Position, Verdict, judge
from schemas.codec import Header
from schemas.events import TERMINAL_TYPES

__all__ = ["Entry", "Positions", "Span", "Tail", "replay_start"]


class Entry(NamedTuple):
    """One accepted event: ``seq`` is its stream sequence, ``data`` the stored bytes.

    A piece of text that ends inside an event has the stream sequence before that event, and as ``offset`` how many of
    its characters are shown. ``moved``: the event stands behind others that are stored after it.
    """

    seq: int
    generation: str
    type: str
    data: bytes
    offset: int = 0
    moved: bool = False

    @property
    def terminal(self) -> bool:
        """Whether it ends its generation."""
        return self.type in TERMINAL_TYPES


class Span(NamedTuple):
    """Where a generation lies in the log: stream sequences of its first and last accepted event."""

    first: int
    last: int
    ended: bool


def replay_start(spans: dict[str, Span]) -> int | None:
    """Return the stream sequence with which a replay of the running or latest generation begins.

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
    """Applies the acceptance rule to the generations of one session.

    At most ``limit`` ended generations are remembered; a running one is never forgotten.
    """

    def __init__(self, limit: int = 1_000) -> None:
        self._positions: dict[str, Position] = {}
        self._limit = limit

    def knows(self, generation: str) -> bool:
        """Tell whether the position in this generation is known."""
        return generation in self._positions

    def begin(self, generation: str, position: Position = BEGINNING) -> None:
        """Set the position from which a generation is read on."""
        self._positions[generation] = position
        if len(self._positions) > self._limit:
            self._forget()

    def offer(self, header: Header) -> Verdict:
        """Judge one event; an accepted one advances the position."""
        position, verdict = judge(
            self._positions.get(header.generation, BEGINNING), header.type, header.epoch, header.seq
        )
        if verdict is Verdict.ACCEPTED:
            self._positions[header.generation] = position
        return verdict

    def _forget(self) -> None:
        ended = [g for g, p in self._positions.items() if p.ended]
        for generation in ended[: len(ended) // 2]:
            del self._positions[generation]


class Tail:
    """The newest accepted events of a session, at most ``max_bytes`` of them (and always the last one).

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
        """Add the newest entry; drop the oldest ones beyond the bound."""
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
        """Return the index of the first entry that ends behind a place (whose ``seq`` must be ≥ ``floor``)."""
        return self.base + bisect_right(self._entries, (seq, offset), key=_place)

    def restart(self, floor: int) -> None:
        """Forget everything; who stood here finds its index below ``base``."""
        self.base = self.end + 1
        self.floor = floor
        self.bytes = 0
        self.spans.clear()
        self._entries.clear()

    def slice(self, start: int, stop: int) -> list[Entry]:
        """Return entries by index; ``start`` must not be below ``base``."""
        return self._entries[start - self.base : stop - self.base]

    def _shrink(self) -> None:
        """Drop the oldest quarter at once, so that dropping costs little for each event."""
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


def _place(entry: Entry) -> tuple[int, int]:
    return entry.seq, entry.offset
