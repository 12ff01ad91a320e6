"""The one acceptance rule, shared by every reader of the log.

An event is accepted iff it belongs to the highest epoch seen and its seq is the next expected one. A higher epoch takes
over with ``restarted`` or a terminal at the next expected seq; the first accepted event may have any epoch. After a
terminal only ``usage`` is accepted, and only from the terminal's own epoch. So duplicates, repeats of a go-back-N
writer and zombies never reach a client.

The rule needs the log in order and without loss: a reader of republished messages must detect a missing message by its
stream sequence and read it from the log before it judges later ones, because a lost takeover would let a zombie
through. Events of an unknown type are judged by their header as well; they occupy a seq.

`judge` is the rule itself. `Acceptance` is the reader of one generation that all services use: it keeps the position,
and joins a generation whose first events have expired at the highest epoch that the log keeps.

Obligations of writers:

- A writer appends its first event on the condition that the subject has not grown since it was read, and waits for the
  acknowledgement before it publishes anything else. So at most one writer can hold an epoch.
- A writer's epoch is above every epoch in the log that it read.
- A repeat is byte-identical, and goes from the first unacknowledged event through *all* later ones, acknowledged ones
  included: readers dropped the events stored behind a missing one.
- An acknowledgement counts only if its stream sequence is above that of the previous event; an acknowledgement of an
  earlier run may refer to a copy that readers dropped.
- No broker-side deduplication (``Nats-Msg-Id``): it would suppress the repeats that readers wait for.
- An append after the terminal (``usage``) is conditional too, unless it comes from the writer of the terminal.
"""

from collections.abc import Iterable
from enum import Enum
from typing import Final, NamedTuple

from schemas.codec import Header
from schemas.events import TERMINAL_TYPES

__all__ = [
    "BEGINNING",
    "BEGINNING_EXPIRED",
    "EVENTS_EXPIRED",
    "Acceptance",
    "Position",
    "Verdict",
    "highest_epoch",
    "judge",
]

BEGINNING_EXPIRED: Final = "beginning_expired"
"""Reason of a gap: the log no longer keeps the first events of a generation."""
EVENTS_EXPIRED: Final = "events_expired"
"""Reason of a gap: events after the last accepted one expired before they were read."""


class Verdict(Enum):
    """Result of judging an event; all but ``ACCEPTED`` are dropped and counted."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    """Its seq was accepted before (a repeat)."""
    GAP = "gap"
    """Its seq is above the next expected one: its writer will repeat from the missing one."""
    ZOMBIE = "zombie"
    """Its epoch has been taken over, or it claims a new epoch without a takeover event."""
    ENDED = "ended"
    """It comes after the terminal and is not ``usage``."""


class Position(NamedTuple):
    """Position of the acceptance rule in a generation. ``next_seq``: the seq expected next."""

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


class Acceptance:
    """Apply the rule to the stored events of one generation, in log order.

    ``epoch``, ``next_seq`` and ``ended`` are the position. ``through``: stream sequence of the last offered message (or
    as set by the owner). ``highest``: the highest epoch seen, dropped events included. ``headless``: at least one
    accepted event follows a gap of expired events. ``lost_beginning``: the first offered event was not the generation's
    first one, so the reader has to `join`.

    After expired events a streaming reader cannot tell from the next event whether a later epoch has taken over the
    generation: that event may be a zombie's. So the protocol has two steps. When `lacks` is true for an event, the
    reader determines whether the events before it have expired: nothing of the generation was accepted yet, or its
    oldest kept message is above ``through``. If not, the writer will repeat the missing event (`expect`). If so, the
    reader finds the highest epoch of the generation in the log (`highest_epoch`), calls `join`, and offers the event
    again.

    `offer` allocates nothing in the common case, an event with the expected epoch and seq.
    """

    __slots__ = (
        "_expected",
        "_gap",
        "_joining",
        "_plain",
        "ended",
        "epoch",
        "headless",
        "highest",
        "joined_at",
        "lost_beginning",
        "next_seq",
        "through",
    )

    def __init__(self, position: Position = BEGINNING, through: int = 0) -> None:
        self.epoch, self.next_seq, self.ended = position
        self.through = through
        self.highest = self.epoch
        self.headless = False
        self.joined_at = 0
        self.lost_beginning = False
        self._gap = ""
        self._joining = False
        self._expected = -1  # the next_seq at which `expect` was called
        self._plain = not self.ended  # whether epoch and seq alone decide

    @classmethod
    def joining(cls, highest: int) -> "Acceptance":
        """Return a reader that starts at the first event whose epoch is at least ``highest``."""
        acceptance = cls()
        acceptance.join(highest)
        return acceptance

    @property
    def position(self) -> Position:
        """Return the position as a value."""
        return Position(self.epoch, self.next_seq, self.ended)

    @property
    def begun(self) -> bool:
        """Return whether any event has been accepted."""
        return self.next_seq > 0

    @property
    def is_joining(self) -> bool:
        """Return whether `join` was called and no event has been accepted since."""
        return self._joining

    def copy(self) -> "Acceptance":
        """Return an independent reader at the same position."""
        other = Acceptance.__new__(Acceptance)
        for name in Acceptance.__slots__:
            setattr(other, name, getattr(self, name))
        return other

    def offer(self, header: Header, at: int = 0) -> Verdict:
        """Judge the next event, at stream sequence ``at``; an accepted event advances the position."""
        self.through = at
        if header.seq == self.next_seq and header.epoch == self.epoch and self._plain:
            self.next_seq = header.seq + 1
            if header.type in TERMINAL_TYPES:
                self.ended, self._plain = True, False
            return Verdict.ACCEPTED
        self.highest = max(self.highest, header.epoch)
        return self._join(header, at) if self._joining else self._judge(header)

    def lacks(self, header: Header) -> bool:
        """Return whether `offer` would drop the event because earlier ones, possibly expired, are missing."""
        if self._joining or header.epoch < self.epoch or header.seq < self.next_seq or self.next_seq == self._expected:
            return False
        missing = header.seq > self.next_seq
        if self.ended:
            return missing and header.type == "usage" and header.epoch == self.epoch
        return missing or (header.epoch > self.epoch and header.seq > 0 and header.type not in _TAKEOVERS)

    def expect(self) -> None:
        """Record that the next expected event has not expired: its writer repeats it, or another writer takes over."""
        self._expected = self.next_seq

    def join(self, highest: int) -> None:
        """Continue at the next offered event with an epoch of at least ``highest`` and a seq not accepted before.

        ``highest``: the highest epoch of this generation in the log; ignored after a terminal, where only usage can
        follow.
        """
        if not self.ended:
            self.epoch = max(self.epoch, highest)
        self._expected = -1
        self._joining, self._plain, self.lost_beginning = True, False, False

    def gap_before(self, at: int) -> str:
        """Return the reason of the gap before the accepted event at stream sequence ``at``, or an empty string."""
        return self._gap if self.joined_at == at else ""

    def _judge(self, header: Header) -> Verdict:
        position, verdict = judge(self.position, header.type, header.epoch, header.seq)
        self.epoch, self.next_seq, self.ended = position
        self._plain = not self.ended
        if verdict is Verdict.GAP and not self.next_seq:
            self.lost_beginning = True
        return verdict

    def _join(self, header: Header, at: int) -> Verdict:
        if header.epoch < self.epoch:
            return Verdict.ZOMBIE
        if header.seq < self.next_seq:
            return Verdict.DUPLICATE
        if self.ended and header.type != "usage":
            return Verdict.ENDED
        if header.seq > self.next_seq:
            self._gap = EVENTS_EXPIRED if self.begun else BEGINNING_EXPIRED
            self.headless, self.joined_at = True, at
        self.epoch, self.next_seq = header.epoch, header.seq + 1
        self.ended = self.ended or header.type in TERMINAL_TYPES
        self._joining, self._plain = False, not self.ended
        return Verdict.ACCEPTED


def highest_epoch(headers: Iterable[Header]) -> int:
    """Return the highest epoch among events, or 0 without any."""
    return max((header.epoch for header in headers), default=0)
