"""The command ``python -m bench fanout``."""

import sys
from pathlib import Path

import click
from rich.console import Console

from bench.fanout.outcome import FanoutOutcome, FanoutReport, ScenarioOutcomes
from bench.fanout.report import checks, show
from bench.fanout.run import Run
from bench.fanout.scenarios import SCENARIOS, Scenario
from bench.fanout.targets import Nchan, Tailrace, Target
from bench.harness import (
    chosen_scenarios,
    common_options,
    listed,
    measuring,
    prepare,
    show_machine,
    show_profile,
)
from bench.machine import machine, now
from bench.processes import Died, TooLate
from bench.profiling import Profile

__all__ = ["fanout"]


@click.command(
    help=f"""Measure fan-out: one log, many subscribers, on a real broker; each subscriber's events are counted.

{listed(SCENARIOS, 15)}

Exit code: 0 nothing lost, doubled or changed, 1 not so, 2 it could not be run, 3 a target was missed (with --strict).
"""
)
@click.argument("scenarios", nargs=-1, type=click.Choice([*SCENARIOS, "all"]), metavar="[SCENARIO]...")
@click.option(
    "--protocol",
    "protocols",
    multiple=True,
    type=click.Choice(["sse", "websocket", "grpc"]),
    default=("sse",),
    show_default=True,
)
@click.option("--clients", default=2, show_default=True, type=click.IntRange(1, 16), help="Client processes.")
@click.option("--peer", type=click.Choice(["nchan"]), help="Measure it too, in the same run, with the same clients.")
@click.option("--only-peer", is_flag=True, help="Measure nothing but the peer.")
@click.option("--profile", "profiled", type=click.Choice(["delivery"]), help="Profile it while events flow.")
@click.option("--sessions", type=click.IntRange(1), help="Instead of the scenario's own.")
@click.option("--subscribers", type=click.IntRange(1), help="Of each session, instead of the scenario's own.")
@click.option("--events", type=click.IntRange(1), help="Of each session, instead of the scenario's own.")
@click.option("--rate", type=click.FloatRange(0.1), help="Events per second and session, instead of the scenario's.")
@common_options
def fanout(  # noqa: D103  # the text and the names are those of the decorators
    scenarios: tuple[str, ...],
    json_file: Path | None,
    protocols: tuple[str, ...],
    clients: int,
    peer: str | None,
    only_peer: bool,
    profiled: str | None,
    profile_file: Path | None,
    sessions: int | None,
    subscribers: int | None,
    events: int | None,
    rate: float | None,
    keep: Path | None,
    strict: bool,
) -> None:
    changes = {"sessions": sessions, "subscribers": subscribers, "events": events, "rate": rate}
    chosen = chosen_scenarios(SCENARIOS, scenarios or ("live-2000x20",), changes)
    console = Console(width=None if sys.stdout.isatty() else 170)
    report = FanoutReport(now(), machine(), False, [])
    show_machine(console, report.machine)
    with measuring(console, report, json_file, strict=strict):
        prepare(max(s.streams + s.stuck for s in chosen))
        beside = Nchan() if peer or only_peer else None
        if beside:
            beside.install()
        profile = Profile(profiled, profile_file or Path(f"{profiled}.folded")) if profiled else None
        session = _Session(protocols, clients, beside, only_peer, profile, keep)
        for scenario in chosen:
            report.scenarios.append(session.measure(scenario))
            show(console, report.scenarios[-1])
            show_profile(console, profile)
        report.good = all(o.good for s in report.scenarios for o in s.outcomes if o.target == "tailrace")


class _Session:
    """What all scenarios of one command share."""

    def __init__(
        self,
        protocols: tuple[str, ...],
        clients: int,
        peer: Nchan | None,
        only_peer: bool,
        profile: Profile | None,
        keep: Path | None,
    ) -> None:
        self._protocols = protocols
        self._clients = clients
        self._peer = peer
        self._only_peer = only_peer
        self._profile = profile
        self._keep = keep

    def measure(self, scenario: Scenario) -> ScenarioOutcomes:
        """Measure one scenario at every target with every protocol."""
        outcomes: list[FanoutOutcome] = []
        failed: dict[str, str] = {}
        if not self._only_peer:
            for protocol in self._protocols:
                if protocol == "grpc" and scenario.kind != "live":
                    failed[protocol] = "its clients do not return; use a live scenario"
                    continue
                outcomes += self._run(scenario, Tailrace(grpc=protocol == "grpc"), protocol)
        if self._peer and scenario.kind == "live":
            try:
                outcomes += self._run(scenario, self._peer, "sse")
            except (Died, TooLate) as error:
                failed[self._peer.name] = str(error)
        return ScenarioOutcomes(scenario, outcomes, checks(scenario, outcomes), failed)

    def _run(self, scenario: Scenario, target: Target, protocol: str) -> list[FanoutOutcome]:
        run = Run(scenario, target, protocol, clients=self._clients, profile=self._profile, keep=self._keep)
        return run.measure()
