"""Check the subscribers' guarantee: all events in the log's order, once, and to the end. Pure."""

from collections.abc import Iterator, Mapping
from typing import Final

from bench.chaos.evidence import Evidence
from bench.chaos.history import Got, Left
from bench.chaos.told import TERMINALS, Entry, Told
from bench.chaos.violation import Violation
from schemas.cursor import Cursor

__all__ = ["check_readers"]

_PASSING: Final = ("503", "429", "401")
"""Statuses after which a client retries: 401 when its credentials expired under way."""


def check_readers(evidence: Evidence) -> Iterator[Violation]:
    """Check every subscriber."""
    places = Places(evidence.told)
    for left in evidence.left:
        got = evidence.got.get(left.watch, [])
        yield from _cursors(left, got)
        yield from _sequence(evidence, left, got, places)
    for said in evidence.said:
        if said.event != "bye" and not (said.event == "status" and said.data.startswith(_PASSING)):
            yield Violation("answer", f"subscriber {said.watch}", f"at {said.t:.1f} s: {said.event} {said.data}")


class Places:
    """Indexes of events among the accepted ones of their generation."""

    def __init__(self, told: Mapping[str, Told]) -> None:
        self._told = told
        self._by_data = {name: {e.data: i for i, e in enumerate(t.accepted)} for name, t in told.items()}
        self._by_place = {name: {e.place: i for i, e in enumerate(t.accepted)} for name, t in told.items()}
        self._stored = {name: {e.data for e in t.stored} for name, t in told.items()}

    def of(self, name: str, record: Got) -> int | None:
        """Return the index of a received event, or ``None`` if it is not an accepted event."""
        if record.data:
            return self._by_data[name].get(record.data)
        place = self._by_place[name].get((record.epoch, record.seq))
        if place is None:
            return None
        event = self._told[name].accepted[place].event
        same = event["type"] == record.type and (event.get("text") or "") == record.text
        return place if same else None

    def stored(self, name: str, data: str) -> bool:
        """Return whether the log contains the event."""
        return data in self._stored[name]


def _cursors(left: Left, got: list[Got]) -> Iterator[Violation]:
    before = left.start
    for record in got:
        seq = Cursor.parse(record.cursor).seq
        if seq < before:
            yield Violation("cursor", f"subscriber {left.watch}", f"{seq} after {before} at {record.t:.2f} s")
            return
        before = seq


def _sequence(evidence: Evidence, left: Left, got: list[Got], places: Places) -> Iterator[Violation]:
    """Each generation's events are those of the log after the subscriber's start, from the first on, without holes."""
    who = f"subscriber {left.watch}"
    wanted = dict(_wanted(evidence, left))
    reached = dict(wanted)
    for record in got:
        name = _generation(record)
        if name not in reached:
            yield Violation("foreign", who, f"got {_short(record)} of another session or generation")
            return
        place = places.of(name, record)
        if place is None:
            rule = "unaccepted" if places.stored(name, record.data) else "not_in_log"
            yield Violation(rule, who, f"at {record.t:.2f} s: {_short(record)}")
            return
        if place != reached[name]:
            rule = "repeated" if place < reached[name] else "skipped"
            detail = f"{name}: event {place} of the log's accepted ones came at {record.t:.2f} s, not {reached[name]}"
            yield Violation(rule, who, f"{detail}: {_short(record)}")
            return
        reached[name] += 1
    for name, first in wanted.items():
        told = evidence.told[name]
        end = _end(told, left)
        if reached[name] < end:
            detail = f"{name}: {reached[name] - first} of {end - first} events, complete: {left.complete}"
            yield Violation("incomplete", who, detail)


def _wanted(evidence: Evidence, left: Left) -> Iterator[tuple[str, int]]:
    """Yield the expected generations, each with the index of its first expected event."""
    for name, told in evidence.told.items():
        if told.session == left.session and left.generation in (None, name):
            yield name, sum(entry.seq <= left.start for entry in told.accepted)


def _end(told: Told, left: Left) -> int:
    """Return how many accepted events a subscriber must have: to the terminal, where the generation alone is read."""
    if left.generation is None:
        return len(told.accepted)
    return next((i + 1 for i, e in enumerate(told.accepted) if _is_terminal(e)), len(told.accepted))


def _is_terminal(entry: Entry) -> bool:
    return entry.type in TERMINALS


def _short(record: Got) -> str:
    return (
        record.data[:160] or f"{record.type} {record.epoch}.{record.seq} of {record.generation}: {record.text[:80]!r}"
    )


def _generation(record: Got) -> str:
    if record.generation:
        return record.generation
    _, _, rest = record.data.partition('"generation":"')
    return rest.partition('"')[0]
