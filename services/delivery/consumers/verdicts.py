"""The acceptance rule for readers that get events twice, late, or shared with others. Pure.

Whether an event is accepted follows from what the log holds of its generation up to it, and from nothing else: it is
the same whenever, wherever and however often the event is delivered. `Track` remembers what the rule has said.
"""

from typing import Final

from schemas.acceptance import BEGINNING, Verdict, joining, judge
from schemas.codec import Header

__all__ = ["REMEMBERED", "Track"]

REMEMBERED: Final = 200
"""Bound of dropped messages remembered for one generation; there are hardly ever any."""


class Track:
    """What the rule says of the stored messages of one generation with stream sequences in (``base``, ``through``].

    ``join_epoch``: the highest epoch that the log keeps, where it no longer keeps the generation's beginning; then
    ``joined_at`` is the stream sequence of the first event that is accepted.
    """

    __slots__ = ("base", "dropped", "join_epoch", "joined_at", "position", "through")

    def __init__(self) -> None:
        self.base = 0
        self.through = 0
        self.position = BEGINNING
        self.dropped: dict[int, str] = {}
        self.join_epoch: int | None = None
        self.joined_at = 0

    def begins_late(self, header: Header | None) -> bool:
        """Tell whether this first readable event shows that the log no longer keeps the generation's beginning."""
        return self.join_epoch is None and self.position is BEGINNING and header is not None and header.seq > 0

    def apply(self, seq: int, header: Header | None) -> None:
        """Judge the next stored message; ``header`` is ``None`` for one that is no event. Earlier ones are ignored."""
        if seq <= self.through:
            return
        self.through = seq
        verdict = "malformed" if header is None else self._judge(seq, header)
        if verdict == Verdict.ACCEPTED.value:
            return
        self.dropped[seq] = verdict
        if len(self.dropped) > REMEMBERED:
            self.base = next(iter(self.dropped))
            del self.dropped[self.base]

    def _judge(self, seq: int, header: Header) -> str:
        if self.join_epoch is not None and self.position is BEGINNING:
            if header.epoch < self.join_epoch:
                return Verdict.ZOMBIE.value
            self.position = joining(header.epoch, header.seq)
            self.joined_at = seq
        self.position, verdict = judge(self.position, header.type, header.epoch, header.seq)
        return verdict.value

    def verdict(self, seq: int) -> str | None:
        """Return what the rule has said of a stored message; ``None`` when that is not known (any more)."""
        if not self.base < seq <= self.through:
            return None
        return self.dropped.get(seq, Verdict.ACCEPTED.value)
