"""Apply the acceptance rule of the protocol's document to the generations of a log. Pure.

An independent implementation on purpose: a checker must not share the code that it checks.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from bench.chaos.history import Logged

__all__ = ["TERMINALS", "Entry", "Told", "tell"]

TERMINALS: Final = ("completed", "failed", "cancelled", "interrupted")


class Entry(msgspec.Struct):
    """One stored message and its event."""

    seq: int
    data: str
    event: dict[str, Any]

    @property
    def type(self) -> str:
        """Return the event's type."""
        return str(self.event["type"])

    @property
    def place(self) -> tuple[int, int]:
        """Return epoch and seq of the event."""
        return self.event.get("epoch", 1), self.event["seq"]


class Told(msgspec.Struct):
    """One generation. ``stored``: all messages; ``accepted``: accepted events; ``dropped``: others by reason."""

    partition: int
    session: str
    generation: str
    stored: list[Entry] = []
    accepted: list[Entry] = []
    dropped: Counter[str] = msgspec.field(default_factory=Counter)

    @property
    def terminals(self) -> list[Entry]:
        """Return the accepted terminals."""
        return [e for e in self.accepted if e.type in TERMINALS]

    @property
    def text(self) -> str:
        """Return the final answer, as shown by a client."""
        pieces: list[str] = []
        for entry in self.accepted:
            if entry.type == "restarted":
                pieces.clear()
            elif entry.type == "delta":
                pieces.append(entry.event.get("text") or "")
        return "".join(pieces)

    @property
    def takeovers(self) -> int:
        """Return the number of takeovers."""
        return sum(e.type in ("restarted", "interrupted") for e in self.accepted)


def tell(messages: Iterable[Logged]) -> dict[str, Told]:
    """Return the generations of a log by name; ``messages`` must be in order within each partition."""
    found: dict[str, Told] = {}
    for message in messages:
        _, partition, _, session, generation = message.subject.split(".")
        told = found.setdefault(generation, Told(int(partition), session, generation))
        told.stored.append(Entry(message.seq, message.data, msgspec.json.decode(message.data)))
    for told in found.values():
        _accept(told)
    return found


def _accept(told: Told) -> None:
    epoch = following = 0
    ended = False
    for entry in told.stored:
        own_epoch, seq = entry.place
        takes_over = entry.type == "restarted" or entry.type in TERMINALS
        if own_epoch < epoch:
            told.dropped["zombies"] += 1
        elif seq < following:
            told.dropped["duplicates"] += 1
        elif ended and entry.type != "usage":
            told.dropped["late"] += 1
        elif seq > following:
            told.dropped["gaps"] += 1
        elif own_epoch > epoch and seq > 0 and not takes_over:
            told.dropped["zombies"] += 1
        else:
            told.accepted.append(entry)
            epoch, following, ended = own_epoch, seq + 1, ended or entry.type in TERMINALS
