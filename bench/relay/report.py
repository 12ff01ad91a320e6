"""Report the results as text and as JSON."""

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from bench.harness import show_verdicts, table
from bench.machine import Machine
from bench.relay.open_report import OpenScenarioReport
from bench.relay.scenarios import Scenario
from bench.stats import Latency, Outcome

__all__ = ["Report", "ScenarioReport", "added", "checks", "show", "stored"]


class ScenarioReport(msgspec.Struct, tag="closed", tag_field="loop"):
    """One scenario: the outcome of each target, and its latency beyond ``direct`` at the same percentiles.

    ``not_measured``: why a peer has no outcome.
    """

    scenario: Scenario
    outcomes: list[Outcome]
    added_ms: dict[str, Latency]
    targets_met: dict[str, bool]
    not_measured: dict[str, str] = {}


class Report(msgspec.Struct):
    """Results of one command. ``good``: all ran, and every client received exactly what the provider sent."""

    at: str
    machine: Machine
    good: bool
    scenarios: list[ScenarioReport | OpenScenarioReport]


def added(outcome: Outcome, direct: Outcome) -> Latency:
    """Return the added latency over a direct connection to the provider, percentile by percentile."""
    a, b = outcome.latency_ms, direct.latency_ms
    differences = (round(x - y, 3) for x, y in ((a.p50, b.p50), (a.p95, b.p95), (a.p99, b.p99), (a.max, b.max)))
    return Latency(*differences)


def stored(scenario: Scenario, outcome: Outcome) -> dict[str, bool]:
    """Return whether a producer alone met each of the scenario's targets, by a text with target and value."""
    t = scenario.targets
    found: dict[str, bool] = {}
    if t.stored_tokens_per_s is not None:
        reached = outcome.tokens_per_s
        found[f"stored tokens/s ≥ {t.stored_tokens_per_s:,.0f}: {reached:,.0f}"] = reached >= t.stored_tokens_per_s
    if t.stored_events_per_s is not None:
        reached = outcome.events / outcome.streaming_s if outcome.streaming_s else 0.0
        found[f"stored events/s ≥ {t.stored_events_per_s:,.0f}: {reached:,.0f}"] = reached >= t.stored_events_per_s
    return found


def checks(scenario: Scenario, outcome: Outcome, more: Latency | None) -> dict[str, bool]:
    """Return whether the pipeline met each of the scenario's targets, by a text with target and value."""
    t = scenario.targets
    found: dict[str, bool] = {}
    if more and t.added_p50_ms is not None:
        found[f"added p50 ≤ {t.added_p50_ms:g} ms: {more.p50:g}"] = more.p50 <= t.added_p50_ms
    if more and t.added_p99_ms is not None:
        found[f"added p99 ≤ {t.added_p99_ms:g} ms: {more.p99:g}"] = more.p99 <= t.added_p99_ms
    if t.cpu_ms_per_1000 is not None:
        cpu = outcome.pipeline_cpu_ms_per_1000
        found[f"CPU per 1,000 tokens ≤ {t.cpu_ms_per_1000:g} ms: {cpu:g}"] = cpu <= t.cpu_ms_per_1000
    if t.tokens_per_s is not None:
        found[f"tokens/s ≥ {t.tokens_per_s:,.0f}: {outcome.tokens_per_s:,.0f}"] = outcome.tokens_per_s >= t.tokens_per_s
    if scenario.rate is not None:
        offered = scenario.generations * scenario.subscribers * scenario.rate
        ideal = scenario.tokens / scenario.rate
        kept = outcome.streaming_s <= ideal * 1.05 + 0.25
        found[f"kept up with {offered:,.0f} tokens/s: {outcome.tokens_per_s:,.0f}"] = kept
    return found


def show(console: Console, report: ScenarioReport) -> None:
    """Print one scenario."""
    s = report.scenario
    pace = f"{s.rate:g} tokens/s" if s.rate else "as fast as the provider sends"
    size = f"{s.generations} generations of {s.tokens:,} tokens"
    console.print(f"\n[bold]{s.name}[/]  {size}, {pace}, {s.subscribers} subscriber(s)")
    console.print(_latencies(report.outcomes, report.added_ms))
    console.print(_processes(report.outcomes))
    for outcome in report.outcomes:
        for problem in outcome.problems:
            console.print(f"[red]{outcome.target}: {problem}[/]", markup=True, highlight=False)
    show_verdicts(console, report.not_measured, report.targets_met)


def _latencies(outcomes: Sequence[Outcome], more: dict[str, Latency]) -> Table:
    made = table("ms", "p50", "p95", "p99", "max", "tokens/s", "events", "complete", "differ", "sender late p99")
    for o in outcomes:
        counts = (f"{o.tokens_per_s:,.0f}", f"{o.events:,}", f"{o.complete}/{o.streams}", str(o.mismatches))
        made.add_row(o.target, *_row(o.latency_ms), *counts, f"{o.provider_late_p99_ms:.1f}")
        if o.target in more:
            made.add_row(f"{o.target} added", *_row(more[o.target]))
    return made


def _row(values: Latency) -> tuple[str, ...]:
    shown = (values.p50, values.p95, values.p99, values.max)
    return tuple(f"{value:,.2f}" for value in shown) if any(shown) else ("-",) * len(shown)  # no live readers


def _processes(outcomes: Sequence[Outcome]) -> Table:
    made = table("CPU", "ms per 1,000 tokens", "seconds", "opening, seconds", "peak RSS MB")
    for o in outcomes:
        parts = [name for name in o.processes if name not in ("provider",) and not name.startswith("client")]
        for name in (*parts, *(n for n in o.processes if n not in parts)):
            cost = o.processes[name]
            cells = (
                f"{cost.cpu_ms_per_1000:.1f}",
                f"{cost.cpu_s:.2f}",
                f"{cost.start_cpu_s:.2f}",
                f"{cost.peak_rss_mb:.0f}",
            )
            made.add_row(f"{o.target}: {name}", *cells)
        if parts:
            made.add_row(f"{o.target}: sum of its {len(parts)}", f"{o.pipeline_cpu_ms_per_1000:.1f}")
    return made
