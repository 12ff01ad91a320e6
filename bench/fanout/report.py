"""Report the results of fan-out runs as text, and check the targets."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.fanout.outcome import FanoutOutcome, ScenarioOutcomes
from bench.fanout.scenarios import Scenario
from bench.harness import show_verdicts, table

__all__ = ["checks", "show"]

IDLE_KB = 20.0
CPU_SHARE = 0.95
SATURATION = 3.0
CROWD_P99_MS = 250.0
STUCK_SHARE = 1.10


def checks(scenario: Scenario, outcomes: Sequence[FanoutOutcome]) -> dict[str, bool]:
    """Return whether each target was met, by a text with target and value; those against a peer need its outcome."""
    own = next((o for o in outcomes if o.target == "tailrace" and o.protocol == "sse"), None)
    peer = next((o for o in outcomes if o.target != "tailrace"), None)
    found: dict[str, bool] = {}
    if own is None:
        return found
    if peer is not None and scenario.rate is not None:
        share = own.cpu_us["delivery"] / (peer.cpu_us["nginx"] or 1.0)
        reads = " and ".join(f"{o.events / max(o.reads, 1):.1f}" for o in (own, peer))
        what = f"CPU per delivered event ≤ {CPU_SHARE} of {peer.target}'s: {share:.2f} ({reads} events a read)"
        found[what] = share <= CPU_SHARE
    if peer is not None and scenario.rate is None:
        times = own.events_per_s / (peer.events_per_s or 1.0)
        found[f"delivered events/s ≥ {SATURATION:g} times {peer.target}'s: {times:.1f}"] = times >= SATURATION
    if scenario.kind == "live" and scenario.sessions == 1 and scenario.subscribers >= 1_000:
        found[f"memory per idle subscriber ≤ {IDLE_KB:g} KB: {own.idle_rss_kb:.1f}"] = own.idle_rss_kb <= IDLE_KB
    if scenario.streams >= 10_000 and scenario.rate == 5.0:
        p99 = own.latency_ms.p99
        found[f"p99 < {CROWD_P99_MS:g} ms: {p99:.0f}"] = p99 < CROWD_P99_MS
    if scenario.stuck:
        without, beside = (
            sorted(o.latency_ms.p99 for o in outcomes if (o.round == "alone") is alone) for alone in (True, False)
        )
        share = sum(beside) / (sum(without) or 1.0)
        found[f"p99 beside stuck clients ≤ {STUCK_SHARE} of that without: {share:.2f}"] = share <= STUCK_SHARE
    return found


def show(console: Console, report: ScenarioOutcomes) -> None:
    """Print one scenario."""
    s = report.scenario
    console.print(f"\n[bold]{s.name}[/]  {s.about}; {s.events - s.history:,} events a session", highlight=False)
    console.print(_delivered(report.outcomes))
    console.print(_costs(report.outcomes))
    if s.kind != "live":
        console.print(_returned(report.outcomes))
    for o in report.outcomes:
        for problem in o.problems:
            console.print(f"{_name(o)}: {problem}", style="red", markup=False, highlight=False)
    show_verdicts(console, report.not_measured, report.targets_met)


def _name(o: FanoutOutcome) -> str:
    return " ".join(part for part in (o.target, o.protocol, o.round) if part)


def _delivered(outcomes: Sequence[FanoutOutcome]) -> Table:
    made = table(
        "ms", "p50", "p95", "p99", "max", "events/s", "events", "a read", "complete", "missing", "twice", "differ"
    )
    for o in outcomes:
        times = (f"{v:,.1f}" for v in (o.latency_ms.p50, o.latency_ms.p95, o.latency_ms.p99, o.latency_ms.max))
        counts = (f"{n:,}" for n in (o.missing, o.surplus, o.mismatches))
        made.add_row(
            _name(o),
            *times,
            f"{o.events_per_s:,.0f}",
            f"{o.events:,}",
            f"{o.events / max(o.reads, 1):.1f}",
            f"{o.complete:,}/{o.streams:,}",
            *counts,
        )
    return made


def _costs(outcomes: Sequence[FanoutOutcome]) -> Table:
    made = table(
        "µs CPU per delivered event", "server", "broker", "publisher", "clients", "CPU s", "opening CPU s",
        "KB idle RSS/PSS", "KB live RSS/PSS", "base MB", "sender late p99",
    )  # fmt: skip
    for o in outcomes:
        server = next(name for name in ("delivery", "nginx") if name in o.cpu_us)
        clients = sum(us for name, us in o.cpu_us.items() if name.startswith("client"))
        made.add_row(
            _name(o),
            f"{o.cpu_us[server]:.2f}",
            f"{o.cpu_us.get('nats-server', 0.0):.2f}",
            f"{o.cpu_us.get('publisher', 0.0):.2f}",
            f"{clients:.2f}",
            f"{o.cpu_s[server]:.2f}",
            f"{o.opening_cpu_s:.2f}",
            f"{o.idle_rss_kb:.1f}/{o.idle_pss_kb:.1f}",
            f"{o.live_rss_kb:.1f}/{o.live_pss_kb:.1f}",
            f"{o.base_rss_mb:.0f}",
            f"{o.late_p99_ms:.1f}",
        )
    return made


def _returned(outcomes: Sequence[FanoutOutcome]) -> Table:
    made = table(
        "returns", "number", "caught up p50", "p99 ms", "broker requests", "messages", "MB", "blocked writes",
        "from the log", "evicted", "peak MB",
    )  # fmt: skip
    for o in outcomes:
        load = o.broker
        broker = (f"{load.requests:,}", f"{load.messages:,}", f"{load.bytes / 1e6:,.1f}") if load else ("", "", "")
        counted = (f"{o.counts.get(name, 0):,.0f}" for name in ("blocked_writes", "replays", "streams_closed:evicted"))
        times = (f"{o.caught_up_ms.p50:,.0f}", f"{o.caught_up_ms.p99:,.0f}")
        made.add_row(_name(o), f"{o.returns:,}", *times, *broker, *counted, f"{o.peak_rss_mb:.0f}")
    return made
