"""Chunk text by granularity: as stored, by line or sentence, or coalesced over a time.

Neighbouring deltas of one generation, epoch, choice and kind (text, reasoning, refusal) are joined; any other event
first releases the held text, so that the order of the log is kept. The pieces of every granularity concatenate to the
text of the log; every piece ends at a position from which reading can continue in any granularity.
"""

import re
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from schemas.events import Delta
from services.delivery.formats.tail import Entry

__all__ = [
    "COALESCE_STEPS",
    "HOLD_CHARS",
    "HOLD_SECONDS",
    "TOKEN",
    "Granularity",
    "Chunker",
    "Position",
    "rest",
    "parse_granularity",
]

HOLD_SECONDS: Final = 2.0
HOLD_CHARS: Final = 4_096
CUTS: Final = 64  # pieces cut from one event; the rest of it is released as one piece
COALESCE_STEPS: Final = (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000)
"""Milliseconds. A requested time is rounded down to a step, so that subscribers share the joined pieces."""
_LOOK_BACK: Final = 16  # characters to rescan for an end that was incomplete
_KINDS: Final = ("text", "reasoning", "refusal")
_LINE: Final = re.compile(r"\n")
_CLOSING: Final = "\"'\u201d\u2019\u00bb)\\]"
_SENTENCE: Final = re.compile(
    rf"[.!?\u2026]+[{_CLOSING}]*\s"  # includes the white space after it: 3.14 has no end
    rf"|[\u3002\uff01\uff1f\uff61\u0964\u061f]+[{_CLOSING}\u300d\u300f\uff09\u3011]*"  # scripts without a space there
    r"|\n"
)


class Position(NamedTuple):
    """Position in a session: a stream sequence, and the characters already read of the next event."""

    seq: int
    offset: int = 0


class Granularity(NamedTuple):
    """How text is chunked. ``hold``: longest time in seconds that text may be held back."""

    mode: Literal["token", "line", "sentence", "coalesce"]
    hold: float = HOLD_SECONDS


TOKEN: Final = Granularity("token", 0.0)


def parse_granularity(granularity: str | None, coalesce: int | None) -> Granularity:
    """Parse a client's granularity parameters.

    Raises:
        ValueError: both are given, or one is out of its range.
    """
    if coalesce is not None:
        if granularity is not None:
            raise ValueError("granularity and coalesce exclude each other")
        if not COALESCE_STEPS[0] <= coalesce <= COALESCE_STEPS[-1]:
            raise ValueError(f"coalesce={coalesce} is not within {COALESCE_STEPS[0]} to {COALESCE_STEPS[-1]} ms")
        return Granularity("coalesce", max(step for step in COALESCE_STEPS if step <= coalesce) / 1_000)
    match granularity:
        case None | "token":
            return TOKEN
        case "line" | "sentence":
            return Granularity(granularity)
        case _:
            raise ValueError(f"granularity={granularity[:40]!r} is not one of: token, line, sentence")


class _Merged(Delta, tag="delta"):
    """Delta with the text of several deltas or a part of one; ``through``: the last seq that it completes."""

    through: int | None = None


class _Part:
    """Rest of one delta, from character ``start`` on."""

    __slots__ = ("delta", "entry", "kind", "start", "text")

    def __init__(self, entry: Entry, delta: Delta, kind: str, text: str, start: int) -> None:
        self.entry = entry
        self.delta = delta
        self.kind = kind
        self.text = text
        self.start = start

    @property
    def key(self) -> tuple[object, ...]:
        delta = self.delta
        return delta.generation, delta.epoch, delta.choice, self.kind

    def position(self) -> Position:
        """Return the position before the rest."""
        return Position(self.entry.seq - 1, self.start)


_decoder: Final = msgspec.json.Decoder(Delta)
_encode: Final = msgspec.json.Encoder().encode


def _part(entry: Entry, start: int) -> _Part | None:
    """Return an entry as text that can be joined or cut, or ``None`` if it is not such text."""
    if entry.type != "delta" or entry.moved or entry.offset:
        return None
    try:
        delta = _decoder.decode(entry.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    for kind in _KINDS:
        text = getattr(delta, kind)
        if text is not None and delta.tool_call is None and delta.binary is None:
            return _Part(entry, delta, kind, text, min(start, len(text)))
    return None


class Chunker:
    """Join and cut deltas; ``position`` is the reader's position in the log.

    Times are seconds of any monotonic clock.
    """

    def __init__(self, granularity: Granularity, position: Position) -> None:
        self.granularity = granularity
        self._begin = position
        self._parts: list[_Part] = []
        self._text = ""  # held text: at most `HOLD_CHARS` and one delta
        self._scan = 0
        self._since = 0.0
        self._released = float("-inf")

    @property
    def due(self) -> float | None:
        """Time at which `settle` must release the held text; ``None`` when nothing is held."""
        if not self._parts:
            return None
        return (self._released if self.granularity.mode == "coalesce" else self._since) + self.granularity.hold

    def position(self, seq: int) -> Position:
        """Return the position after the released text, when all entries up to ``seq`` were offered."""
        return self._parts[0].position() if self._parts else Position(seq)

    def offer(self, entry: Entry, now: float) -> list[Entry]:
        """Add the next entry; return the entries to send now."""
        start = self._begin.offset if entry.seq == self._begin.seq + 1 else 0
        if self.granularity.mode == "token" and not start:
            return [entry]
        part = _part(entry, start)
        if part is None:
            return [*self._release(), entry]
        shown: list[Entry] = []
        if self._parts and self._parts[0].key != part.key:
            shown = self._release()
        if not self._parts:
            self._since = now
        self._parts.append(part)
        self._text += part.text[part.start :]
        shown += self._cut(now)
        return shown

    def settle(self, now: float) -> list[Entry]:
        """Release the held text if its hold time has ended."""
        due = self.due
        if due is None or now < due:
            return []
        self._released = now
        return self._release()

    def release(self) -> list[Entry]:
        """Release the held text."""
        return self._release()

    def _cut(self, now: float) -> list[Entry]:
        if self.granularity.mode == "token":
            return self._release()
        shown: list[Entry] = []
        if self.granularity.mode != "coalesce":
            while len(shown) < CUTS and (end := self._end()) is not None:
                shown.append(self._take(end))
                self._since = now
        if len(self._text) >= HOLD_CHARS or len(shown) == CUTS:
            shown += self._release()
        return shown

    def _end(self) -> int | None:
        """Return the end of the first complete line or sentence in the held text."""
        text = self._text
        for match in (_LINE if self.granularity.mode == "line" else _SENTENCE).finditer(text, self._scan):
            if self.granularity.mode == "line" or not text[: match.end()].isspace():
                return match.end()
        self._scan = max(0, len(text) - _LOOK_BACK)
        return None

    def _release(self) -> list[Entry]:
        return [self._take(len(self._text), whole=True)] if self._parts else []

    def _take(self, size: int, *, whole: bool = False) -> Entry:
        """Remove ``size`` characters of the held text as one piece; ``whole``: with empty deltas at its end."""
        parts, taken, left = self._parts, 0, size
        first, start, within = parts[0], parts[0].start, 0
        # Consume whole deltas; the last one may be cut and stay held.
        while taken < len(parts) and (left > 0 or whole):
            part = parts[taken]
            rest_ = len(part.text) - part.start
            if rest_ > left:
                part.start += left
                within = part.start
                break
            left -= rest_
            taken += 1
        piece = _piece(parts[: taken + (within > 0)], first, start, self._text[:size], within)
        del parts[:taken]
        self._text, self._scan = self._text[size:], 0
        return piece


def _piece(parts: Sequence[_Part], first: _Part, start: int, text: str, within: int) -> Entry:
    """Return the entry of one piece; ``within``: characters of its last delta, if it ends inside that delta."""
    last = parts[-1]
    if len(parts) == 1 and not start and not within:
        return first.entry
    delta = first.delta
    through = last.delta.seq if not within else (parts[-2].delta.seq if len(parts) > 1 else delta.seq - 1)
    merged = _Merged(
        generation=delta.generation,
        seq=delta.seq,
        epoch=delta.epoch,
        at=delta.at,
        v=delta.v,
        choice=delta.choice,
        tokens=last.delta.tokens,
        provider_at=delta.provider_at,
        through=None if through == delta.seq else through,
    )
    setattr(merged, first.kind, text)
    seq = last.entry.seq - (within > 0)
    return Entry(seq, first.entry.generation, "delta", _encode(merged), within)


def rest(entries: Sequence[Entry], position: Position, end: Position) -> Entry | None:
    """Return the rest, after ``position``, of a piece that ends at ``end``; ``None`` if it is not text.

    ``entries``: the log's events after ``position`` whose text the piece holds.
    """
    parts = [_part(entry, position.offset if entry.seq == position.seq + 1 else 0) for entry in entries]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    texts = [part.text[part.start :] for part in known]
    if end.offset:
        last = known[-1]
        texts[-1] = last.text[last.start : end.offset]
    return _piece(known, known[0], known[0].start, "".join(texts), end.offset)
