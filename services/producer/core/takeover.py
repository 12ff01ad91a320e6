"""What a producer does with a request, given what the log already holds of its generation."""

from typing import Literal

import msgspec

from schemas.acceptance import Acceptance, Position, Verdict
from schemas.codec import MalformedEvent, decode_header

__all__ = ["Begun", "Decision", "decide"]

Decision = Literal["run", "restart", "interrupt", "done"]


class Begun(msgspec.Struct):
    """What the log holds of a generation, folded message by message with `take`.

    ``tokens`` is the running count of the last accepted delta; ``has_tokens`` whether there is any, or may have been
    among events that have expired.

    A log that no longer keeps the generation's beginning is read twice: the first time shows that (`lost_beginning`)
    and which epoch is the highest, the second time begins with `joining` that epoch.
    """

    acceptance: Acceptance = msgspec.field(default_factory=Acceptance)
    tokens: int = 0
    has_tokens: bool = False

    @classmethod
    def joining(cls, highest: int) -> "Begun":
        """Return one that has read nothing and begins with the oldest kept event of the epoch ``highest``."""
        return cls(Acceptance.joining(highest))

    @property
    def position(self) -> Position:
        """The position behind the last accepted event."""
        return self.acceptance.position

    @property
    def last_seq(self) -> int:
        """The stream sequence of the last stored message of any kind, for a conditional append."""
        return self.acceptance.through

    @property
    def lost_beginning(self) -> bool:
        """Whether the first events have expired."""
        return self.acceptance.lost_beginning

    def take(self, data: bytes, stream_seq: int) -> None:
        """Take the next stored message; one that is no event only counts as stored."""
        try:
            header = decode_header(data)
        except MalformedEvent:
            self.acceptance.through = stream_seq
            return
        if self.acceptance.offer(header, stream_seq) is not Verdict.ACCEPTED:
            return
        if header.type == "restarted":
            self.tokens, self.has_tokens = 0, False
        elif header.type == "delta":
            self.tokens, self.has_tokens = header.tokens, True
        elif self.acceptance.joined_at == stream_seq:
            self.has_tokens = True


def decide(begun: Begun, *, may_restart: bool) -> Decision:
    """Return what to do: ``run`` it, ``restart`` it in a new epoch, ``interrupt`` it, or nothing (``done``).

    A generation without tokens simply runs: nobody has seen anything that must be taken back.
    """
    if begun.position.ended:
        return "done"
    if begun.position.next_seq == 0:
        return "run"
    if not begun.has_tokens or may_restart:
        return "restart"
    return "interrupt"
