"""What billing was promised: its rows are what the log says, each generation in one status. Pure."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from bench.chaos.evidence import Evidence
from bench.chaos.told import TERMINALS, Told
from bench.chaos.violation import Violation

__all__ = ["check_bills", "expected_row"]


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
        expected = expected_row(told)
        exported = evidence.exported.get(name, [])
        if exported:
            expected |= {"input": exported[-1].input, "output": exported[-1].output}
        differing = {key: (row[key], value) for key, value in expected.items() if row[key] != value}
        if differing:
            yield Violation("billed", name, f"billing and log differ: {differing}")
        if row["status"] not in _statuses(expected):
            yield Violation("billed", name, f"status {row['status']} of a generation that is {expected['state']}")


def expected_row(told: Told) -> dict[str, Any]:
    """Return the columns that the log determines."""
    row: dict[str, Any] = {"state": "running", "counted_input": 0, "counted_output": 0, "input": None, "output": None}
    for entry in told.accepted:
        event = entry.event
        row["epoch"], row["next_seq"] = entry.place[0], entry.place[1] + 1
        if entry.type == "delta":
            row["counted_output"] = event.get("tokens") or row["counted_output"]
        elif entry.type == "usage":
            row["input"], row["output"] = event["usage"].get("input", 0), event["usage"].get("output", 0)
        elif entry.type in TERMINALS:
            row["state"] = entry.type
        counted = event.get("counted") or {}
        row["counted_input"] = counted.get("input") or row["counted_input"]
        row["counted_output"] = counted.get("output") or row["counted_output"]
    return row | {name: told.dropped[name] for name in ("duplicates", "gaps", "zombies", "late")}


def _statuses(expected: dict[str, Any]) -> tuple[str, ...]:
    if expected["state"] == "running":
        return ("running",)
    if expected["state"] != "completed":
        return ("partial",)
    return ("awaiting_provider", "provider_missing") if expected["output"] is None else ("matched", "drift")
