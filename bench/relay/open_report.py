"""The result of open-loop runs as text."""

import msgspec
from rich.console import Console

from bench.harness import show_verdicts, table
from bench.relay.arrivals import OpenScenario
from bench.relay.open_run import CapacityStep, OpenOutcome
from bench.stats import Latency

__all__ = ["OpenScenarioReport", "show_open", "show_stages", "show_step"]


class OpenScenarioReport(msgspec.Struct, tag="open", tag_field="loop"):
    """One scenario at each target. ``capacity``: of each target, in starts per second, where it was searched."""

    scenario: OpenScenario
    outcomes: list[OpenOutcome]
    not_measured: dict[str, str] = {}
    capacity: dict[str, float] = {}
    targets_met: dict[str, bool] = {}


def _added(of: Latency, direct: Latency) -> Latency:
    """Return what a target adds to connecting directly, percentile by percentile, in milliseconds."""
    return Latency(*(round(max(0.0, getattr(of, n) - getattr(direct, n)), 3) for n in ("p50", "p95", "p99", "max")))


def show_open(console: Console, report: OpenScenarioReport) -> None:
    """Print one scenario."""
    console.print(f"\n[bold]{report.scenario.name}[/]  {report.scenario.about}", highlight=False)
    direct = next((o for o in report.outcomes if o.target == "direct"), None)
    for title, name in (
        ("first token, ms", "first_ms"),
        ("gap behind the provider, ms", "gap_ms"),
        ("resume, ms", "resume_ms"),
    ):
        made = table(title, "p50", "p95", "p99", "max", "first start" if name == "first_ms" else "")
        for o in report.outcomes:
            own: Latency = getattr(o, name)
            if not own.max:
                continue
            made.add_row(o.target, *_cells(own), f"{o.very_first_ms:.1f}" if name == "first_ms" else "")
            if direct and o is not direct and name != "resume_ms":
                made.add_row(f"{o.target} added", *_cells(_added(own, getattr(direct, name))), "")
        if made.row_count:
            console.print(made)
    costs = table(
        "CPU and results",
        "ms a start",
        "ms per 1,000 tokens",
        "starts/s",
        "starts",
        "whole",
        "cancelled",
        "failed",
        "resumed",
    )
    for o in report.outcomes:
        counts = (o.starts, o.complete, o.cancelled, o.failed, o.resumes)
        total = sum(o.cpu_ms_per_start.values())
        costs.add_row(
            o.target, f"{total:.2f}", f"{o.cpu_ms_per_1000:.0f}", f"{o.starts_per_s:.1f}", *(f"{n:,}" for n in counts)
        )
        for process, cpu in o.cpu_ms_per_start.items():
            costs.add_row(f"  {process}", f"{cpu:.2f}")
    console.print(costs)
    for o in report.outcomes:
        for problem in o.problems:
            console.print(f"{o.target}: {problem}", style="red", markup=False, highlight=False)
    for name, rate in report.capacity.items():
        console.print(f"capacity of {name}: {rate:g} starts/s", highlight=False)
    show_verdicts(console, report.not_measured, report.targets_met)


def show_stages(console: Console, report: OpenScenarioReport) -> None:
    """Print the stages of a start."""
    for o in report.outcomes:
        if o.stages_ms:
            made = table("stage of a start", "mean ms")
            for name, mean in o.stages_ms.items():
                made.add_row(name, f"{mean:.2f}")
            console.print(made)


def show_step(console: Console, target: str, step: CapacityStep) -> None:
    """Print one step of the search for a capacity."""
    values = f"first token p99 {step.first_p99_ms:.0f} ms, gap p99 {step.gap_p99_ms:.0f} ms"
    text = f"{target} at {step.starts:g} starts/s: {values}"
    console.print(f"{'[green]holds[/]' if step.holds else '[red]fails[/]'} {text}", highlight=False)


def _cells(values: Latency) -> tuple[str, ...]:
    return tuple(f"{value:,.2f}" for value in (values.p50, values.p95, values.p99, values.max))
