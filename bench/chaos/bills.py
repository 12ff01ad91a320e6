"""Check billing's guarantee: its rows agree with the log, each generation in one status. Pure."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec

from bench.chaos.evidence import Evidence
from bench.chaos.history import Exported
from bench.chaos.told import TERMINALS, Told
from bench.chaos.violation import Violation

__all__ = ["Call", "calls_of", "check_bills", "expected_row"]


def check_bills(evidence: Evidence) -> Iterator[Violation]:
    """Compare billing's rows with a fold of the log."""
    rows = Counter(record.row["generation"] for record in evidence.billed)
    for name in evidence.told.keys() - rows.keys():
        yield Violation("unbilled", name, "in the log and not in billing")
    for record in evidence.billed:
        row, name = record.row, record.row["generation"]
        told = evidence.told.get(name)
        if told is None or rows[name] != 1:
            yield Violation(
                "billed", name, f"{rows[name]} rows in billing, {'no' if told is None else 'one'} in the log"
            )
            continue
        exported = evidence.exported.get(name, [])
        expected = expected_row(told, exported[-1] if exported else None)
        differing = {key: (row[key], value) for key, value in expected.items() if row[key] != value}
        if differing:
            yield Violation("billed", name, f"billing and log differ: {differing}")
        last = exported[-1].output if exported else calls_of(told)[-1].output
        if row["status"] not in _statuses(expected["state"], last):
            yield Violation("billed", name, f"status {row['status']} of a generation that is {expected['state']}")


class Call(msgspec.Struct):
    """One call in the log: our count, and its provider's report, if any."""

    counted_input: int = 0
    counted_output: int = 0
    input: int | None = None
    output: int | None = None


def calls_of(told: Told) -> list[Call]:
    """Return the generation's calls according to the log; the generation ended with the last one.

    A restart or a notice names the call that it abandons. A restart without a call abandons the events counted so far.
    """
    left: list[Call] = []
    last = Call()
    for entry in told.accepted:
        event = entry.event
        named = event.get("call") if entry.type in ("restarted", "notice") else None
        if named is not None:
            left.append(_named(named))
        elif entry.type == "restarted" and (last.counted_output or last.output is not None):
            left.append(last)
        if named is not None or entry.type == "restarted":
            last = Call(counted_input=last.counted_input)
        if entry.type == "delta":
            last.counted_output = event.get("tokens") or last.counted_output
        elif entry.type == "usage":
            call = left[event["call"] - 1] if event.get("call") else last
            call.input, call.output = event["usage"].get("input", 0), event["usage"].get("output", 0)
        counted = event.get("counted") or {}
        last.counted_input = counted.get("input") or last.counted_input
        last.counted_output = counted.get("output") or last.counted_output
    return [*left, last]


def _named(named: dict[str, Any]) -> Call:
    counted, usage = named.get("counted", {}), named.get("usage")
    call = Call(counted.get("input", 0), counted.get("output", 0))
    if usage is not None:
        call.input, call.output = usage.get("input", 0), usage.get("output", 0)
    return call


def expected_row(told: Told, exported: Exported | None = None) -> dict[str, Any]:
    """Return the columns that the log determines, over all calls; an export overrides the last call's report."""
    row: dict[str, Any] = {"state": "running"}
    for entry in told.accepted:
        row["epoch"], row["next_seq"] = entry.place[0], entry.place[1] + 1
        if entry.type in TERMINALS:
            row["state"] = entry.type
    calls = calls_of(told)
    row["counted_input"] = sum(call.counted_input for call in calls)
    row["counted_output"] = sum(call.counted_output for call in calls)
    if exported is not None:
        calls[-1].input, calls[-1].output = exported.input, exported.output
    reported = [call for call in calls if call.output is not None]
    row["input"] = sum(call.input or 0 for call in reported) if reported else None
    row["output"] = sum(call.output or 0 for call in reported) if reported else None
    return row | {name: told.dropped[name] for name in ("duplicates", "gaps", "zombies", "late")}


def _statuses(state: str, reported: int | None) -> tuple[str, ...]:
    if state == "running":
        return ("running",)
    if state != "completed":
        return ("partial",)
    return ("awaiting_provider", "provider_missing") if reported is None else ("matched", "drift")
