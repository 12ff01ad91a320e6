"""The one acceptance rule, shared by every reader of the log.

An event is accepted iff it belongs to the highest epoch seen and its seq is the next expected one. A higher epoch takes
over with ``restarted`` or a terminal at the next expected seq; the first event of all may be of any epoch. After a
terminal only ``usage`` is accepted, and only from the terminal's own epoch. So duplicates, repeats of a go-back-N
writer and zombies never reach a client.

The rule needs the log in its order and without loss: who reads republished messages must find a lost one by its stream
sequence and read it back before judging what follows, because a lost takeover would let a zombie through. Types that a
reader does not know are judged like any other, by their header; they occupy a seq.

What the rule relies on from writers:

- The first event of a writer is appended on the condition that the subject has not grown since it was read, and is
  acknowledged before the writer publishes anything else. So at most one writer can hold an epoch.
- A writer's epoch is above every epoch in the log that it read.
- A repeat is byte-identical, and goes from the first unacknowledged event through *all* later ones, also those that
  were acknowledged: what was stored behind a missing event has been dropped by readers.
- An acknowledgement counts only if its stream sequence is above that of the event before; one that answers an earlier
  run may speak of a copy that readers dropped.
- No broker-side deduplication (``Nats-Msg-Id``): it would swallow the repeats that readers wait for.
- An append after the terminal (``usage``) is conditional too, unless it comes from the writer of the terminal.
"""

from enum import Enum
from typing import Final, NamedTuple

from schemas.events import TERMINAL_TYPES

__all__ = ["BEGINNING", "Position", "Verdict", "judge", "joining"]


class Verdict(Enum):
    """What the rule says of an event; everything but ``ACCEPTED`` is dropped and counted."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    """Its seq was accepted before (a repeat)."""
    GAP = "gap"
    """Its seq is beyond the next expected one: its writer will repeat from the missing one."""
    ZOMBIE = "zombie"
    """Its epoch has been taken over, or it claims a new epoch without a takeover event."""
    ENDED = "ended"
    """It comes after the terminal and is not ``usage``."""


class Position(NamedTuple):
    """How far a generation has been accepted. ``next_seq`` is the seq expected next."""

    epoch: int = 0
    next_seq: int = 0
    ended: bool = False


BEGINNING: Final = Position()
_TAKEOVERS = TERMINAL_TYPES | {"restarted"}


def judge(position: Position, type_: str, epoch: int, seq: int) -> tuple[Position, Verdict]:
    """Return the position after an event of this type, epoch and seq, and the verdict on it.

    Pure: the position is returned unchanged unless the verdict is ``ACCEPTED``.
    """
    if epoch < position.epoch:
        return position, Verdict.ZOMBIE
    if seq < position.next_seq:
        return position, Verdict.DUPLICATE
    if position.ended and type_ != "usage":
        return position, Verdict.ENDED
    if seq > position.next_seq:
        return position, Verdict.GAP
    if epoch > position.epoch and seq > 0 and type_ not in _TAKEOVERS:
        return position, Verdict.ZOMBIE
    return Position(epoch, seq + 1, position.ended or type_ in TERMINAL_TYPES), Verdict.ACCEPTED


def joining(epoch: int, seq: int) -> Position:
    """Return the position of a reader that begins at this event because the log no longer keeps what came before.

    To be used for the oldest kept event of the highest epoch that is kept, when the first events of a generation have
    expired, and only when that loss is told to whoever reads (`judge` from `BEGINNING` would find a gap for ever).
    """
    return Position(epoch, seq, ended=False)
