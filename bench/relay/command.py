"""The command ``python -m bench relay``."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

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
from bench.peers import PEERS, is_peer
from bench.processes import Died, TooLate
from bench.profiling import Profile
from bench.relay.arrivals import OPEN_SCENARIOS, OpenScenario
from bench.relay.open_report import OpenScenarioReport, show_open, show_stages, show_step
from bench.relay.open_run import CapacityStep, OpenOutcome, OpenRun, capacity
from bench.relay.report import Report, ScenarioReport, added, checks, show, stored
from bench.relay.run import Run
from bench.relay.scenarios import SCENARIOS, Scenario
from bench.relay.targets import Direct, Producer, Tailrace, Target
from bench.stats import Outcome
from services.kit.telemetry import configure_logging

__all__ = ["relay"]

PEER_SLOWER = 20


@click.command(
    help=f"""Measure the relay: a provider that stamps each token, the pipeline, and clients that check every text.

The same clients first read from the provider directly; what the pipeline adds is the difference.

Closed loop: all streams are opened, then they begin together.

{listed(SCENARIOS, 13)}

Open loop: answers are asked for at their times, whatever the pipeline does, and latencies are taken from the time at
which a start was due. 10 % of the clients drop and resume, 5 % cancel.

{listed(OPEN_SCENARIOS, 13)}

Exit code: 0 all texts identical and complete, 1 not so, 2 it could not be run, 3 a target was missed (with --strict).
"""
)
@click.argument("scenarios", nargs=-1, type=click.Choice([*SCENARIOS, *OPEN_SCENARIOS, "all"]), metavar="[SCENARIO]...")
@click.option("--clients", default=1, show_default=True, type=click.IntRange(1, 16), help="Client processes.")
@click.option(
    "--target", "only", multiple=True, type=click.Choice(["direct", "tailrace", "producer"]), help="Measure only this."
)
@click.option("--peer", "peers", multiple=True, type=click.Choice(list(PEERS)), help="Measure these relays too.")
@click.option("--peer-venv", type=click.Path(path_type=Path), help="Folder of the peers' environments. Kept.")
@click.option("--profile", "profiled", type=click.Choice(["producer", "delivery", "billing"]), help="Profile it.")
@click.option("--generations", type=click.IntRange(1), help="Closed loop: instead of the scenario's own.")
@click.option("--tokens", type=click.IntRange(1), help="Tokens of each generation, instead of the scenario's own.")
@click.option("--rate", type=click.FloatRange(0.1), help="Tokens per second and stream, instead of the scenario's own.")
@click.option("--subscribers", type=click.IntRange(1), help="Closed loop: of each generation.")
@click.option("--starts", type=click.FloatRange(0.1), help="Open loop: starts per second.")
@click.option("--seconds", type=click.FloatRange(1.0), help="Open loop: how long starts arrive.")
@click.option("--seed", default=1, show_default=True, help="Open loop: of arrivals, lengths, drops and cancels.")
@click.option(
    "--capacity", "searched", is_flag=True, help="Open loop: search the highest rate that each target carries."
)
@click.option("--stages", is_flag=True, help="Open loop: print the stages of a start, from the services' metrics.")
@common_options
def relay(  # noqa: D103  # the text and the names are those of the decorators
    scenarios: tuple[str, ...],
    json_file: Path | None,
    clients: int,
    only: tuple[str, ...],
    peers: tuple[str, ...],
    peer_venv: Path | None,
    profiled: str | None,
    profile_file: Path | None,
    generations: int | None,
    tokens: int | None,
    rate: float | None,
    subscribers: int | None,
    starts: float | None,
    seconds: float | None,
    seed: int,
    searched: bool,
    stages: bool,
    keep: Path | None,
    strict: bool,
) -> None:
    configure_logging("bench", "error", "console")
    asked = [name for name in scenarios or ("paced-200",) if name != "all"]
    every = "all" in scenarios
    closed = chosen_scenarios(
        SCENARIOS,
        ["all"] if every else [name for name in asked if name in SCENARIOS],
        {"generations": generations, "tokens": tokens, "rate": rate, "subscribers": subscribers},
    )
    opened = chosen_scenarios(
        OPEN_SCENARIOS,
        ["all"] if every else [name for name in asked if name in OPEN_SCENARIOS],
        {"tokens": tokens, "rate": rate, "starts": starts, "seconds": seconds},
    )
    # A pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 140)
    report = Report(now(), machine(), False, [])
    show_machine(console, report.machine)
    with measuring(console, report, json_file, strict=strict), tempfile.TemporaryDirectory() as temporary:
        prepare()
        beside = [PEERS[name]((peer_venv or Path(temporary)) / name) for name in peers]
        for peer in beside:
            peer.install()
        own: tuple[Target, ...] = (Direct(), Tailrace(), Producer())
        targets = [*(t for t in own if t.name in (only or ("direct", "tailrace"))), *beside]
        profile = Profile(profiled, profile_file or Path(f"{profiled}.folded")) if profiled else None
        for scenario in closed:
            made = _measure(scenario, targets, clients, profile, keep)
            report.scenarios.append(made)
            show(console, made)
            show_profile(console, profile)
        for load in opened:
            opening = _Opening(console, clients, seed, profile, keep, searched)
            ways = [target for target in targets if target.name != "producer"]
            report.scenarios.append(opened_report := opening.measure(load, ways))
            if stages:
                show_stages(console, opened_report)
            show_profile(console, profile)
        report.good = all(
            o.good for s in report.scenarios for o in s.outcomes if o.target in ("direct", "tailrace", "producer")
        )


class _Opening:
    """Open-loop runs with the options of one command."""

    def __init__(
        self, console: Console, clients: int, seed: int, profile: Profile | None, keep: Path | None, searched: bool
    ) -> None:
        self._console = console
        self._clients = clients
        self._seed = seed
        self._profile = profile
        self._keep = keep
        self._searched = searched

    def measure(self, load: OpenScenario, targets: Sequence[Target]) -> OpenScenarioReport:
        """Measure one scenario at every target, or search each target's capacity."""
        report = OpenScenarioReport(load, [])
        for target in targets:
            try:
                if not self._searched:
                    report.outcomes.append(self._run(load, target))
                elif target.name != "direct":
                    report.capacity[target.name] = self._capacity(load, target)
            except (Died, TooLate) as error:
                if target.name in ("direct", "tailrace"):
                    raise
                report.not_measured[target.name] = str(error)
        show_open(self._console, report)
        return report

    def _run(self, load: OpenScenario, target: Target) -> OpenOutcome:
        profile = self._profile if target.name == "tailrace" else None
        run = OpenRun(load, target, clients=self._clients, seed=self._seed, profile=profile, keep=self._keep)
        return run.measure()

    def _capacity(self, load: OpenScenario, target: Target) -> float:
        def show_one(step: CapacityStep) -> None:
            show_step(self._console, target.name, step)

        return capacity(load, lambda changed: self._run(changed, target), show_one)


def _measure(
    scenario: Scenario, targets: list[Target], clients: int, profile: Profile | None, keep: Path | None
) -> ScenarioReport:
    outcomes: dict[str, Outcome] = {}
    failed: dict[str, str] = {}
    for target in targets:
        run = Run(
            scenario,
            target,
            clients=clients,
            patience=PEER_SLOWER if is_peer(target) else 1,
            profile=profile,
            keep=keep,
        )
        try:
            outcomes[target.name] = run.measure()
        except (Died, TooLate) as error:
            if not is_peer(target):
                raise
            failed[target.name] = str(error)
    direct = outcomes.get("direct")
    more = {name: added(o, direct) for name, o in outcomes.items() if direct and name not in ("direct", "producer")}
    own = outcomes.get("tailrace")
    met = checks(scenario, own, more.get("tailrace")) if own else {}
    if alone := outcomes.get("producer"):
        met |= stored(scenario, alone)
    return ScenarioReport(scenario, list(outcomes.values()), more, met, failed)
