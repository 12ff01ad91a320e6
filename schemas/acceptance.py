"""The one acceptance rule, shared by every reader of the log.

An event is accepted iff it belongs to the highest epoch seen and its seq is the next expected one. A higher epoch takes
over with ``restarted`` or a terminal at the next expected seq. After a terminal only ``usage`` is accepted. So
duplicates, repeats of a go-back-N writer and zombies never reach a client.
"""

from enum import Enum
from typing import Final, NamedTuple

from schemas.events import TERMINAL_TYPES

__all__ = ["BEGINNING", "Position", "Verdict", "judge"]


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
