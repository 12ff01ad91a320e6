"""The acceptance rule for readers that get events twice, late, or shared with others. Pure.

Whether an event is accepted follows from what the log holds of its generation up to it, and from nothing else: it is
the same whenever, wherever and however often the event is delivered. `Track` remembers what the rule has said.
"""

from typing import Final

from schemas.acceptance import Acceptance, Verdict
from schemas.codec import Header

__all__ = ["REMEMBERED", "Track"]

REMEMBERED: Final = 200
"""Bound of dropped messages remembered for one generation; there are hardly ever any."""


class Track:
    """What the rule says of the stored messages of one generation with stream sequences in (``base``, ``through``]."""

    __slots__ = ("acceptance", "base", "dropped")

    def __init__(self) -> None:
        self.base = 0
        self.acceptance = Acceptance()
        self.dropped: dict[int, str] = {}

    @property
    def through(self) -> int:
        """The stream sequence of the last message that was judged."""
        return self.acceptance.through

    def apply(self, seq: int, header: Header | None) -> None:
        """Judge the next stored message; ``header`` is ``None`` for one that is no event. Earlier ones are ignored."""
        if seq <= self.through:
            return
        if header is None:
            self.acceptance.through = seq
            verdict = "malformed"
        else:
            verdict = self.acceptance.offer(header, seq).value
        if verdict == Verdict.ACCEPTED.value:
            return
        self.dropped[seq] = verdict
        if len(self.dropped) > REMEMBERED:
            self.base = next(iter(self.dropped))
            del self.dropped[self.base]

    def verdict(self, seq: int) -> str | None:
        """Return what the rule has said of a stored message; ``None`` when that is not known (any more)."""
        if not self.base < seq <= self.through:
            return None
        return self.dropped.get(seq, Verdict.ACCEPTED.value)
