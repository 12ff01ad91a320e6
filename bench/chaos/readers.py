"""What subscribers were promised: everything in the log's order, once, and to the end. Pure."""

from collections.abc import Iterator

from bench.chaos.evidence import Evidence
from bench.chaos.history import Got, Left
from bench.chaos.told import TERMINALS, Entry, Told
from bench.chaos.violation import Violation
from schemas.cursor import Cursor

__all__ = ["check_readers"]


def check_readers(evidence: Evidence) -> Iterator[Violation]:
    """Check every subscriber."""
    places = {name: {e.data: i for i, e in enumerate(told.accepted)} for name, told in evidence.told.items()}
    stored = {name: {e.data for e in told.stored} for name, told in evidence.told.items()}
    for left in evidence.left:
        got = evidence.got.get(left.watch, [])
        yield from _cursors(left, got)
        yield from _sequence(evidence, left, got, places, stored)
    for said in evidence.said:
        if said.event != "bye" and not (said.event == "status" and said.data.startswith(("503", "429"))):
            yield Violation("answer", f"subscriber {said.watch}", f"at {said.t:.1f} s: {said.event} {said.data}")


def _cursors(left: Left, got: list[Got]) -> Iterator[Violation]:
    before = left.start
    for record in got:
        seq = Cursor.parse(record.cursor).seq
        if seq < before:
            yield Violation("cursor", f"subscriber {left.watch}", f"{seq} after {before} at {record.t:.2f} s")
            return
        before = seq


def _sequence(
    evidence: Evidence, left: Left, got: list[Got], places: dict[str, dict[str, int]], stored: dict[str, set[str]]
) -> Iterator[Violation]:
    """Each generation's events are those of the log after the subscriber's start, from the first on, without holes."""
    who = f"subscriber {left.watch}"
    wanted = dict(_wanted(evidence, left))
    reached = dict(wanted)
    for record in got:
        name = _generation(record)
        if name not in reached:
            yield Violation("foreign", who, f"got {record.data[:160]} of another session or generation")
            return
        place = places[name].get(record.data)
        if place is None:
            rule = "unaccepted" if record.data in stored[name] else "not_in_log"
            yield Violation(rule, who, f"at {record.t:.2f} s: {record.data[:200]}")
            return
        if place != reached[name]:
            rule = "repeated" if place < reached[name] else "skipped"
            detail = f"{name}: event {place} of the log's accepted ones came at {record.t:.2f} s, not {reached[name]}"
            yield Violation(rule, who, f"{detail}: {record.data[:160]}")
            return
        reached[name] += 1
    for name, first in wanted.items():
        told = evidence.told[name]
        end = _end(told, left)
        if reached[name] < end:
            detail = f"{name}: {reached[name] - first} of {end - first} events, complete: {left.complete}"
            yield Violation("incomplete", who, detail)


def _wanted(evidence: Evidence, left: Left) -> Iterator[tuple[str, int]]:
    """Yield what the subscriber is to get: generations, and the index of the first accepted event of each."""
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


def _generation(record: Got) -> str:
    _, _, rest = record.data.partition('"generation":"')
    return rest.partition('"')[0]
