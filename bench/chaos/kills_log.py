"""Generate a log of many small generations with all kinds of irregularities from a seed. Pure."""

import random
from collections.abc import Iterator
from typing import Final

from schemas.codec import encode_event
from schemas.events import (
    Cancelled,
    Completed,
    Delta,
    Event,
    Failed,
    Interrupted,
    Restarted,
    Started,
    UsageReported,
)
from schemas.subjects import Address, token_subject
from schemas.usage import Counted, Usage

__all__ = ["ABREAST", "messages", "name_of"]

ABREAST: Final = 50
"""Number of concurrent generations."""
SESSIONS: Final = 40
BEGUN: Final = 1_700_000_000.0
REPEATED: Final = 0.05
"""Probability that a writer repeats stored events."""
EARLY: Final = 0.02
"""Probability that an event is stored before its predecessor; it is repeated then."""


def name_of(number: int) -> str:
    """Return the name of a generation."""
    return f"gen_{number:010}"


def messages(seed: int, generations: int, partitions: int) -> Iterator[tuple[str, bytes]]:
    """Yield subjects and messages of the whole log, in storage order."""
    rng = random.Random(seed)
    running: list[tuple[str, Iterator[Event]]] = []
    number = 0
    while running or number < generations:
        while len(running) < ABREAST and number < generations:
            address = Address.of("default", f"s{number % SESSIONS}", name_of(number), partitions)
            running.append((token_subject(address), _repeating(rng, list(_events(rng, number)))))
            number += 1
        index = rng.randrange(len(running))
        subject, events = running[index]
        event = next(events, None)
        if event is None:
            running[index] = running[-1]
            running.pop()
        else:
            yield subject, encode_event(event)


def _repeating(rng: random.Random, events: list[Event]) -> Iterator[Event]:
    for end in range(1, len(events) + 1):
        yield events[end - 1]
        if rng.random() < REPEATED:
            yield from events[rng.randrange(end) : end]
        if rng.random() < EARLY:
            place = (events[end - 1].epoch, events[end - 1].seq + 2)
            yield from (event for event in events[end + 1 : end + 2] if (event.epoch, event.seq) == place)


def _events(rng: random.Random, number: int) -> Iterator[Event]:
    """Yield one generation: complete, restarted or cut off, with usage in time, late, corrected or missing."""
    writer = _Writer(number, rng.randint(5, 50))
    yield writer.started()
    yield from writer.deltas(rng.randint(1, 4))
    if rng.random() < 0.1:
        zombie = writer.copy()
        yield writer.restarted()
        yield from writer.deltas(rng.randint(0, 3))
        yield from zombie.deltas(1)
    reported = rng.random() < 0.7
    if reported and rng.random() < 0.7:
        yield writer.usage(rng)
    yield writer.end(rng)
    if rng.random() < 0.03:
        yield from writer.copy().deltas(1)  # a zombie that has not seen the end
    while reported and rng.random() < 0.3:
        yield writer.usage(rng)


class _Writer:
    """Create events in sequence."""

    def __init__(self, number: int, inputs: int) -> None:
        self.number = number
        self.inputs = inputs
        self.output = 0
        self.seq = 0
        self.epoch = 1

    def copy(self) -> "_Writer":
        """Return an independent writer at the same position."""
        other = _Writer(self.number, self.inputs)
        other.seq, other.epoch, other.output = self.seq, self.epoch, self.output
        return other

    @property
    def counted(self) -> Counted:
        """Return the count so far."""
        return Counted(input=self.inputs, output=self.output, exact=True, encoding="o200k_base")

    def _place(self) -> dict[str, object]:
        place = {"generation": name_of(self.number), "seq": self.seq, "epoch": self.epoch, "at": BEGUN + self.number}
        self.seq += 1
        return place

    def started(self) -> Event:
        """Return the first event."""
        counted = Counted(input=self.inputs, exact=True, encoding="o200k_base")
        model = f"m{self.number % 3}"
        return Started(**self._place(), model=model, provider="chaos", upstream_model=model, counted=counted)  # type: ignore[arg-type]  # its place

    def deltas(self, count: int) -> Iterator[Event]:
        """Yield ``count`` pieces of text."""
        for _ in range(count):
            self.output += 7
            yield Delta(**self._place(), text=" a few words", tokens=self.output)  # type: ignore[arg-type]  # its place

    def restarted(self) -> Event:
        """Return ``restarted`` and begin the next epoch."""
        self.epoch += 1
        return Restarted(**self._place(), reason="producer_lost", provider="chaos")  # type: ignore[arg-type]  # its place

    def usage(self, rng: random.Random) -> Event:
        """Return the provider's usage: the count, or a similar number."""
        usage = Usage(input=self.inputs, output=self.output + rng.choice((0, 0, 0, 3, 40)))
        return UsageReported(**self._place(), usage=usage, provider="chaos")  # type: ignore[arg-type]  # its place

    def end(self, rng: random.Random) -> Event:
        """Return a terminal."""
        kind = rng.choices(("completed", "failed", "cancelled", "interrupted"), (16, 1, 1, 2))[0]
        if kind == "interrupted":
            self.epoch += 1
            return Interrupted(**self._place(), reason="producer_lost")  # type: ignore[arg-type]  # its place
        place = self._place()
        if kind == "failed":
            return Failed(**place, code="upstream_error", counted=self.counted)  # type: ignore[arg-type]  # its place
        if kind == "cancelled":
            return Cancelled(**place, reason="requested", counted=self.counted)  # type: ignore[arg-type]  # its place
        return Completed(**place, finish_reason="stop", counted=self.counted)  # type: ignore[arg-type]  # its place
