"""The command ``python -m bench relay``."""

import sys
import tempfile
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
from bench.peers import LiteLLM
from bench.processes import Died, TooLate
from bench.profiling import Profile
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

{listed(SCENARIOS, 12)}

Exit code: 0 all texts identical and complete, 1 not so, 2 it could not be run, 3 a target was missed (with --strict).
"""
)
@click.argument("scenarios", nargs=-1, type=click.Choice([*SCENARIOS, "all"]), metavar="[SCENARIO]...")
@click.option("--clients", default=1, show_default=True, type=click.IntRange(1, 16), help="Client processes.")
@click.option(
    "--target", "only", multiple=True, type=click.Choice(["direct", "tailrace", "producer"]), help="Measure only this."
)
@click.option("--peer", type=click.Choice(["litellm"]), help="Measure this relay too; installed on request.")
@click.option("--peer-venv", type=click.Path(path_type=Path), help="Where the peer is, or is to be, installed. Kept.")
@click.option("--profile", "profiled", type=click.Choice(["producer", "delivery", "billing"]), help="Profile it.")
@click.option("--generations", type=click.IntRange(1), help="Instead of the scenario's own.")
@click.option("--tokens", type=click.IntRange(1), help="Tokens of each generation, instead of the scenario's own.")
@click.option("--rate", type=click.FloatRange(0.1), help="Tokens per second and stream, instead of the scenario's own.")
@click.option("--subscribers", type=click.IntRange(1), help="Of each generation, instead of the scenario's own.")
@common_options
def relay(  # noqa: D103  # the text and the names are those of the decorators
    scenarios: tuple[str, ...],
    json_file: Path | None,
    clients: int,
    only: tuple[str, ...],
    peer: str | None,
    peer_venv: Path | None,
    profiled: str | None,
    profile_file: Path | None,
    generations: int | None,
    tokens: int | None,
    rate: float | None,
    subscribers: int | None,
    keep: Path | None,
    strict: bool,
) -> None:
    configure_logging("bench", "error", "console")
    changes = {"generations": generations, "tokens": tokens, "rate": rate, "subscribers": subscribers}
    chosen = chosen_scenarios(SCENARIOS, scenarios or ("paced-200",), changes)
    # A pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 130)
    report = Report(now(), machine(), False, [])
    show_machine(console, report.machine)
    with measuring(console, report, json_file, strict=strict), tempfile.TemporaryDirectory() as temporary:
        prepare()
        every: tuple[Target, ...] = (Direct(), Tailrace(), Producer())
        targets = [t for t in every if t.name in (only or ("direct", "tailrace"))]
        if peer:
            proxy = LiteLLM(peer_venv or Path(temporary))
            proxy.install()
            targets.append(proxy)
        profile = Profile(profiled, profile_file or Path(f"{profiled}.folded")) if profiled else None
        for scenario in chosen:
            report.scenarios.append(_measure(scenario, targets, clients, profile, keep))
            show(console, report.scenarios[-1])
            show_profile(console, profile)
        report.good = all(o.good for s in report.scenarios for o in s.outcomes if o.target != peer)


def _measure(
    scenario: Scenario, targets: list[Target], clients: int, profile: Profile | None, keep: Path | None
) -> ScenarioReport:
    outcomes: dict[str, Outcome] = {}
    failed: dict[str, str] = {}
    for target in targets:
        is_peer = isinstance(target, LiteLLM)
        run = Run(scenario, target, clients=clients, patience=PEER_SLOWER if is_peer else 1, profile=profile, keep=keep)
        try:
            outcomes[target.name] = run.measure()
        except (Died, TooLate) as error:
            if not is_peer:
                raise
            failed[target.name] = str(error)
    direct = outcomes.get("direct")
    more = {name: added(o, direct) for name, o in outcomes.items() if direct and name not in ("direct", "producer")}
    own = outcomes.get("tailrace")
    met = checks(scenario, own, more.get("tailrace")) if own else {}
    if alone := outcomes.get("producer"):
        met |= stored(scenario, alone)
    return ScenarioReport(scenario, list(outcomes.values()), more, met, failed)
