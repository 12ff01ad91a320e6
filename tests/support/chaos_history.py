"""A correct run of one generation as a history, which tests of the checker alter."""

import json
from typing import Any

from bench.chaos.check import check
from bench.chaos.evidence import Evidence
from bench.chaos.history import (
    AnyRecord,
    Billed,
    Connected,
    Exited,
    Got,
    Left,
    Logged,
    Memory,
    Opened,
    Posted,
    Quiet,
    Sent,
    SentEnd,
)
from bench.chaos.schedule import LEASE, draw
from schemas.cursor import CursorIssuer

__all__ = ["ANSWER", "ISSUER", "LAST", "WALL", "Story", "event"]

WALL = 1_000.0
ISSUER = CursorIssuer(0, "2026-01-01", "default", "s1")
LAST = 5


def event(type_: str, seq: int, *, epoch: int = 1, **more: Any) -> dict[str, Any]:
    return {"type": type_, "generation": "g", "seq": seq, "epoch": epoch, "at": WALL + seq, **more}


ANSWER = [
    event("started", 0, counted={"input": 20}),
    event("delta", 1, text="one", tokens=1),
    event("delta", 2, text=" two", tokens=2),
    event("usage", 3, usage={"input": 20, "output": 2}),
    event("completed", 4, counted={"input": 20, "output": 2}),
]


class Story:
    """A correct run of one generation; tests alter parts of it. Log sequences begin at 1."""

    def __init__(self) -> None:
        self.schedule = draw(1, 10.0)
        self.log = [dict(e) for e in ANSWER]
        self.got = {0: list(range(LAST)), 1: list(range(LAST))}  # by subscriber: indices of the log
        self.calls = [("end", "one two")]
        self.row: dict[str, Any] = {
            "generation": "g",
            "state": "completed",
            "status": "matched",
            "counted_input": 20,
            "counted_output": 2,
            "input": 20,
            "output": 2,
            "epoch": 1,
            "next_seq": 5,
            **dict.fromkeys(("duplicates", "gaps", "zombies", "late"), 0),
        }
        self.more: list[AnyRecord] = []
        self.posted = True

    def records(self) -> list[AnyRecord]:
        data = [json.dumps(e, separators=(",", ":")) for e in self.log]
        found: list[AnyRecord] = [
            Opened(schedule=self.schedule, wall=WALL, lease=LEASE, memory={"producer": 100 << 20, "node": 100 << 20})
        ]
        if self.posted:
            cursor = ISSUER.issue(0)
            found.append(Posted(ask=0, key="k0", session="s1", generation="g", cursor=cursor, seconds=1.0))
        for number, (how, text) in enumerate(self.calls, 1):
            found += [Sent(key="k0", call=number, text=text), SentEnd(key="k0", call=number, how=how)]
        for watch, indices in self.got.items():
            found.append(Connected(watch=watch, replica=0, cursor=None, status=200))
            found += [Got(watch=watch, cursor=ISSUER.issue(i + 1), data=data[i]) for i in indices]
            generation = "g" if watch == 0 else None
            found.append(Left(watch=watch, session="s1", generation=generation, start=0, complete=True))
        found += [Quiet(t=10.0), Exited(process="billing-0", code=0, asked=True, seconds=1.0)]
        found.append(Memory(process="producer-0", peak=90 << 20))
        found += [Logged(partition=0, seq=i, subject="tokens.0.default.s1.g", data=d) for i, d in enumerate(data, 1)]
        return [*found, *([Billed(row=self.row)] if self.row else []), *self.more]

    def rules(self) -> list[str]:
        return [violation.rule for violation in check(Evidence.of(self.records()))]
