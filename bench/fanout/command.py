"""The command ``python -m bench fanout``."""

import resource
import signal
import sys
from pathlib import Path
from typing import Final, NoReturn

import click
import msgspec
from rich.console import Console

from bench.fanout.outcome import FanoutOutcome, FanoutReport, ScenarioOutcomes
from bench.fanout.report import checks, show
from bench.fanout.run import Run
from bench.fanout.scenarios import SCENARIOS, Scenario, scenario_names
from bench.fanout.targets import Nchan, Tailrace, Target
from bench.peers import PeerNotInstalled
from bench.processes import Died, TooLate
from bench.profiling import Profile, ProfilerMissing, top_costs
from bench.report import machine, now

__all__ = ["fanout"]

EXIT_WRONG: Final = 1
EXIT_NOT_RUN: Final = 2
EXIT_TARGETS_MISSED: Final = 3
DESCRIPTORS: Final = 65_536
SPARE: Final = 1_000
_LIST: Final = (
    "\b\n"
    + "\n".join(f"  {s.name:<15} {s.about}" for s in SCENARIOS.values())
    + "\n  all             every one but smoke"
)


@click.command(
    help=f"""Measure fan-out: one log, many subscribers, on a real broker; each subscriber's events are counted.

{_LIST}

Exit code: 0 no event lost, duplicated or changed, 1 otherwise, 2 the run was not possible, 3 a target was missed (with
--strict).
"""
)
@click.argument("scenarios", nargs=-1, type=click.Choice([*SCENARIOS, "all"]), metavar="[SCENARIO]...")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the result as JSON.")
@click.option(
    "--protocol",
    "protocols",
    multiple=True,
    type=click.Choice(["sse", "websocket", "grpc"]),
    default=("sse",),
    show_default=True,
)
@click.option("--clients", default=2, show_default=True, type=click.IntRange(1, 16), help="Client processes.")
@click.option(
    "--peer", type=click.Choice(["nchan"]), help="Measure this peer too, in the same run, with the same clients."
)
@click.option("--only-peer", is_flag=True, help="Measure only the peer.")
@click.option("--profile", "profiled", type=click.Choice(["delivery"]), help="Process to profile while events flow.")
@click.option("--profile-file", type=click.Path(path_type=Path), help="Folded stacks; default: PROCESS.folded")
@click.option("--sessions", type=click.IntRange(1), help="Number of sessions, instead of the scenario's.")
@click.option("--subscribers", type=click.IntRange(1), help="Subscribers per session, instead of the scenario's.")
@click.option("--events", type=click.IntRange(1), help="Events per session, instead of the scenario's.")
@click.option("--rate", type=click.FloatRange(0.1), help="Events per second and session, instead of the scenario's.")
@click.option("--keep", type=click.Path(path_type=Path, exists=False), help="Keep logs and data in this new folder.")
@click.option("--strict", is_flag=True, help="Exit with 3 when a target is missed.")
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
    given = {name: value for name, value in changes.items() if value is not None}
    chosen = [msgspec.structs.replace(SCENARIOS[n], **given) for n in scenario_names(scenarios or ("live-2000x20",))]
    console = Console(width=None if sys.stdout.isatty() else 170)
    report = FanoutReport(now(), machine(), False, [])
    m = report.machine
    console.print(f"{m.cores} cores, {m.processor}, {m.memory_gb:g} GB, {m.system}, Python {m.python}", highlight=False)
    try:
        _prepare(max(s.streams + s.stuck for s in chosen))
        beside = Nchan() if peer or only_peer else None
        if beside:
            beside.install()
        profile = Profile(profiled, profile_file or Path(f"{profiled}.folded")) if profiled else None
        session = _Session(protocols, clients, beside, only_peer, profile, keep)
        for scenario in chosen:
            report.scenarios.append(session.measure(scenario))
            show(console, report.scenarios[-1])
            if profile and profile.path.exists():
                _show_profile(console, profile)
        report.good = all(o.good for s in report.scenarios for o in s.outcomes if o.target == "tailrace")
    except (Died, TooLate, PeerNotInstalled, ProfilerMissing, TooFewDescriptors) as error:
        console.print(f"not measured: {error}", style="red", markup=False, highlight=False)
        sys.exit(EXIT_NOT_RUN)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if json_file:
            json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    _exit(report, strict)


class TooFewDescriptors(Exception):
    """The limit of file descriptors is too low for the connections of a scenario."""


class _Session:
    """The state shared by all scenarios of one command."""

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


def _show_profile(console: Console, profile: Profile) -> None:
    console.print(f"\n[bold]{profile.name}[/]: percent in itself and with what it calls ({profile.path})")
    for share in top_costs(profile.path):
        console.print(f"{share.own:6.1f} {share.total:6.1f}  {share.name}", markup=False, highlight=False)


def _exit(report: FanoutReport, strict: bool) -> NoReturn:
    if not report.good:
        sys.exit(EXIT_WRONG)
    if strict and not all(met for s in report.scenarios for met in s.targets_met.values()):
        sys.exit(EXIT_TARGETS_MISSED)
    sys.exit(0)


def _prepare(streams: int) -> None:
    """Raise the limit of file descriptors, and stop in order on SIGTERM as on Ctrl-C.

    Raises:
        TooFewDescriptors: the system does not allow it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if streams + SPARE > limit:
        raise TooFewDescriptors(f"{streams:,} connections need `ulimit -Hn` of {streams + SPARE:,}; it is {limit:,}")

    def interrupt(_signum: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
