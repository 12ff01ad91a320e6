"""``python -m bench``: measure the relay end to end, measure fan-out, and check the guarantees under faults."""

import resource
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import click
import msgspec
from rich.console import Console

from bench.billing import billing
from bench.chaos.command import chaos
from bench.chaos.kills_command import billing_kills
from bench.fanout.command import fanout
from bench.peers import LiteLLM, PeerNotInstalled
from bench.processes import Died, TooLate
from bench.profiling import Profile, ProfilerMissing, top_costs
from bench.report import Report, ScenarioReport, added, checks, machine, now, show, stored
from bench.run import Run
from bench.scenarios import SCENARIOS, Scenario, scenario_names
from bench.stats import Outcome
from bench.targets import Direct, Producer, Tailrace, Target
from services.kit.telemetry import configure_logging

EXIT_WRONG = 1
EXIT_NOT_RUN = 2
EXIT_TARGETS_MISSED = 3
PEER_SLOWER = 20
CHOICES = [*SCENARIOS, "all"]
LIST = (
    "\b\n" + "\n".join(f"  {s.name:<12} {s.about}" for s in SCENARIOS.values()) + "\n  all          every one but smoke"
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Measure Tailrace on this machine. All processes run on free loopback ports, in a temporary folder."""


main.add_command(billing)
main.add_command(billing_kills)
main.add_command(chaos)
main.add_command(fanout)


@main.command(
    help=f"""Measure the relay: a provider that stamps each token, the pipeline, and clients that check every text.

The same clients first read from the provider directly; what the pipeline adds is the difference.

{LIST}

Exit code: 0 all texts identical and complete, 1 otherwise, 2 the run was not possible, 3 a target was missed (with
--strict).
"""
)
@click.argument("scenarios", nargs=-1, type=click.Choice(CHOICES), metavar="[SCENARIO]...")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the result as JSON.")
@click.option("--clients", default=1, show_default=True, type=click.IntRange(1, 16), help="Client processes.")
@click.option(
    "--target",
    "only",
    multiple=True,
    type=click.Choice(["direct", "tailrace", "producer"]),
    help="Measure only this target.",
)
@click.option("--peer", type=click.Choice(["litellm"]), help="Measure this relay too; installed on request.")
@click.option(
    "--peer-venv",
    type=click.Path(path_type=Path),
    help="Virtual environment of the peer; created if missing, and kept.",
)
@click.option(
    "--profile", "profiled", type=click.Choice(["producer", "delivery", "billing"]), help="Process to profile."
)
@click.option("--profile-file", type=click.Path(path_type=Path), help="Folded stacks; default: PROCESS.folded")
@click.option("--generations", type=click.IntRange(1), help="Number of generations, instead of the scenario's.")
@click.option("--tokens", type=click.IntRange(1), help="Tokens per generation, instead of the scenario's.")
@click.option("--rate", type=click.FloatRange(0.1), help="Tokens per second and stream, instead of the scenario's.")
@click.option("--subscribers", type=click.IntRange(1), help="Subscribers per generation, instead of the scenario's.")
@click.option("--keep", type=click.Path(path_type=Path, exists=False), help="Keep logs and data in this new folder.")
@click.option("--strict", is_flag=True, help="Exit with 3 when a target is missed.")
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
    _prepare()
    configure_logging("bench", "error", "console")
    changes = {"generations": generations, "tokens": tokens, "rate": rate, "subscribers": subscribers}
    given = {name: value for name, value in changes.items() if value is not None}
    chosen = [msgspec.structs.replace(SCENARIOS[name], **given) for name in scenario_names(scenarios or ("paced-200",))]
    # A pipe has no width.
    console = Console(width=None if sys.stdout.isatty() else 130)
    report = Report(now(), machine(), False, [])
    m = report.machine
    console.print(f"{m.cores} cores, {m.processor}, {m.memory_gb:g} GB, {m.system}, Python {m.python}", highlight=False)
    try:
        with tempfile.TemporaryDirectory(prefix="tailrace-peer-") as temporary:
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
                if profile:
                    _show_profile(console, profile)
        report.good = all(o.good for s in report.scenarios for o in s.outcomes if o.target != peer)
    except (Died, TooLate, PeerNotInstalled, ProfilerMissing) as error:
        console.print(f"[red]not measured:[/] {error}", highlight=False)
        sys.exit(EXIT_NOT_RUN)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if json_file:
            json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    _exit(report, strict)


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


def _show_profile(console: Console, profile: Profile) -> None:
    if not profile.path.exists():
        return
    console.print(
        f"\n[bold]{profile.name}[/]: where its time goes, percent in itself and with what it calls ({profile.path})"
    )
    for share in top_costs(profile.path):
        console.print(f"{share.own:6.1f} {share.total:6.1f}  {share.name}", markup=False, highlight=False)


def _exit(report: Report, strict: bool) -> NoReturn:
    if not report.good:
        sys.exit(EXIT_WRONG)
    if strict and not all(met for s in report.scenarios for met in s.targets_met.values()):
        sys.exit(EXIT_TARGETS_MISSED)
    sys.exit(0)


def _prepare() -> None:
    """Raise the limit of file descriptors, and stop in order on SIGTERM as on Ctrl-C."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    def interrupt(_signum: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


if __name__ == "__main__":
    main(prog_name="python -m bench")
