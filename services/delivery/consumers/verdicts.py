"""Apply the acceptance rule for readers that get events repeatedly, late, or shared with other readers. Pure.

The verdict on an event depends only on the log of its generation up to that event: it is the same for every time,
reader and repeat of a delivery. `Track` caches the verdicts.
"""

from typing import Final

from schemas.acceptance import Acceptance, Verdict
from schemas.codec import Header

__all__ = ["REMEMBERED", "Track"]

REMEMBERED: Final = 200
"""Most dropped messages remembered for one generation; dropped messages are rare."""


class Track:
    """Cache the verdicts on one generation's stored messages with stream sequences in (``base``, ``through``]."""

    __slots__ = ("acceptance", "base", "dropped")

    def __init__(self) -> None:
        self.base = 0
        self.acceptance = Acceptance()
        self.dropped: dict[int, str] = {}

    @property
    def through(self) -> int:
        """The stream sequence of the last judged message."""
        return self.acceptance.through

    def apply(self, seq: int, header: Header | None) -> None:
        """Judge the next stored message, ignore earlier ones; ``header``: ``None`` for a message that is no event."""
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
        """Return the verdict on a stored message, or None when it is not known (any more)."""
        if not self.base < seq <= self.through:
            return None
        return self.dropped.get(seq, Verdict.ACCEPTED.value)
