"""Summarise runs in numbers. Pure."""

from collections import Counter

import msgspec

from bench.chaos.check import end_times
from bench.chaos.evidence import Evidence
from bench.chaos.violation import Violation

__all__ = ["Found", "Summary", "summary_of"]


class Found(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The violations of one seed; ``smallest``: the schedule's faults that still showed the first of them."""

    seed: int
    violations: list[Violation]
    history: str
    smallest: list[str] = []
    runs: int = 0


class Summary(msgspec.Struct, kw_only=True):
    """Sums over runs; ``slowest_end`` and ``peak_mb`` are maxima.

    ``events``: accepted ones in the log. ``received``: events received by subscribers. ``resumes``: connections with a
    last id. ``served``: events received by workers from durable consumers. ``evicted``: stuck clients that were
    evicted. ``entries``: of the ledger. ``slowest_machine``: slowdown over a quiet machine (see `pace`).
    ``slowest_end``: seconds without faults from a request's acceptance to its terminal.
    """

    runs: int = 0
    seconds: float = 0.0
    requests: int = 0
    subscribers: int = 0
    events: int = 0
    received: int = 0
    faults: dict[str, int] = {}
    resumes: int = 0
    served: int = 0
    evicted: int = 0
    exported: int = 0
    entries: int = 0
    slowest_machine: float = 1.0
    takeovers: int = 0
    terminals: dict[str, int] = {}
    dropped: dict[str, int] = {}
    slowest_end: float = 0.0
    peak_mb: dict[str, int] = {}
    violations: int = 0
    not_run: int = 0
    found: list[Found] = []

    def add(self, other: "Summary") -> None:
        """Add another summary to this one."""
        for name in (
            "runs",
            "seconds",
            "requests",
            "subscribers",
            "events",
            "received",
            "resumes",
            "served",
            "evicted",
            "exported",
            "entries",
            "takeovers",
            "not_run",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("faults", "terminals", "dropped"):
            setattr(self, name, dict(Counter(getattr(self, name)) + Counter(getattr(other, name))))
        self.slowest_end = max(self.slowest_end, other.slowest_end)
        self.slowest_machine = max(self.slowest_machine, other.slowest_machine)
        self.peak_mb = {
            name: max(self.peak_mb.get(name, 0), other.peak_mb.get(name, 0))
            for name in sorted(self.peak_mb.keys() | other.peak_mb.keys())
        }
        self.violations += other.violations
        self.found += other.found


def summary_of(evidence: Evidence, violations: list[Violation]) -> Summary:
    """Return the summary of one run."""
    peaks: dict[str, int] = {}
    for record in evidence.memory:
        kind = record.process.partition("-")[0]
        peaks[kind] = max(peaks.get(kind, 0), record.peak >> 20)
    return Summary(
        runs=1,
        seconds=evidence.opened.schedule.seconds,
        requests=len(evidence.posted),
        subscribers=len(evidence.left),
        events=sum(len(told.accepted) for told in evidence.told.values()),
        received=sum(map(len, evidence.got.values())),
        faults=Counter(f"{hit.fault.kind} {hit.fault.target.partition('-')[0]}" for hit, _ in evidence.faults),
        resumes=_resumes(evidence),
        served=sum(map(len, evidence.served.values())),
        evicted=sum(record.ended for record in evidence.stuck),
        exported=sum(map(len, evidence.exported.values())),
        entries=len(evidence.amounts.entries) if evidence.amounts else 0,
        slowest_machine=round(evidence.slowness, 1),
        takeovers=sum(told.takeovers for told in evidence.told.values()),
        terminals=Counter(e.type for told in evidence.told.values() for e in told.terminals),
        dropped=sum((told.dropped for told in evidence.told.values()), Counter()),
        slowest_end=round(max(end_times(evidence).values(), default=0.0), 1),
        peak_mb=peaks,
        violations=len(violations),
    )


def _resumes(evidence: Evidence) -> int:
    """Return the number of connections that resumed after an event: with a last id after the subscriber's start."""
    seen: set[int] = set()
    count = 0
    for record in evidence.connected:
        count += record.watch in seen and record.status in (200, 204)
        seen.add(record.watch)
    return count
