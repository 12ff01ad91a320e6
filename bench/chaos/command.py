"""The command ``python -m bench chaos``."""

import asyncio
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import click
import msgspec
import uvloop
from rich.console import Console

from bench.chaos.check import check
from bench.chaos.evidence import Evidence
from bench.chaos.history import read_history
from bench.chaos.planted import BUGS
from bench.chaos.run import Run
from bench.chaos.schedule import KINDS, Fault, FaultKind, Schedule, draw, shape_of
from bench.chaos.shrink import shrink
from bench.chaos.summary import Found, Summary, summary_of
from bench.chaos.violation import Violation
from bench.processes import Died
from services.kit.telemetry import configure_logging

__all__ = ["chaos", "parse_seeds"]

EXIT_WRONG = 1
EXIT_NOT_RUN = 2
RUN_BOUND = 600.0
"""Seconds beyond its schedule after which a run is aborted."""
SHOWN = 5


def parse_seeds(text: str) -> list[int]:
    """Parse seeds such as ``1-5,9``.

    Raises:
        ValueError: ``text`` contains no seeds.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"seeds {text!r}: use numbers and ranges like 1-5,9")
        seeds += range(int(first), int(last if dash else first) + 1)
    if not seeds:
        raise ValueError(f"seeds {text!r}: there are none, use numbers and ranges like 1-5,9")
    return seeds


@click.command(
    help="""Inject random faults into the system and check its guarantees.

Each seed is a schedule of generations, subscribers that drop and resume, and faults: processes killed, frozen and
drained, connections cut, held and slowed. The history is then checked. See docs/chaos.md.

Exit code: 0 no violation, 1 violations, 2 the run was not possible.
"""
)
@click.option("--seeds", default="1", show_default=True, help="Seeds of the schedules: 1-100, or 3,7.")
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(5), help="Duration of the faults.")
@click.option("--nodes", default="3", show_default=True, type=click.Choice(["1", "3"]), help="Nodes of the broker.")
@click.option("--fault", "faults", multiple=True, type=click.Choice([*KINDS, "roll"]), help="Only faults of this kind.")
@click.option("--on", "targets", multiple=True, help="Only faults of these targets: producer, delivery-0, node …")
@click.option("--planted", type=click.Choice(list(BUGS)), help="Start the services with this bug.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the summary as JSON.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep histories and logs of all runs in this folder.")
@click.option(
    "--shrink", "shrink_runs", default=12, show_default=True, help="Largest number of runs to find a smaller schedule."
)
@click.option(
    "--check", "history", type=click.Path(path_type=Path, exists=True), help="Check a kept history instead of a run."
)
def chaos(  # noqa: D103  # the text is that of the decorator
    seeds: str,
    seconds: float,
    nodes: str,
    faults: tuple[FaultKind, ...],
    targets: tuple[str, ...],
    planted: str | None,
    json_file: Path | None,
    keep: Path | None,
    shrink_runs: int,
    history: Path | None,
) -> None:
    _stop_in_order()
    configure_logging("bench", "error", "console")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    total = Summary()
    if history is not None:
        evidence = Evidence.of(read_history(history))
        violations = check(evidence)
        total = summary_of(evidence, violations)
        _tell(console, evidence.opened.schedule.seed, total, violations)
        sys.exit(EXIT_WRONG if violations else 0)
    try:
        numbers = parse_seeds(seeds)
        shape = shape_of(int(nodes), faults, targets)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    trial = Trial(console, keep or Path(tempfile.mkdtemp(prefix="tailrace-chaos-")), planted or "", shrink_runs)
    try:
        for seed in numbers:
            try:
                total.add(trial.seed(draw(seed, seconds, shape)))
            except (Died, TimeoutError) as error:
                total.not_run += 1
                console.print(f"seed {seed}: not run: {error!r}")
            if json_file:
                json_file.write_bytes(msgspec.json.format(msgspec.json.encode(total), indent=2) + b"\n")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if keep is None and not total.violations and not total.not_run:
            shutil.rmtree(trial.folder, ignore_errors=True)
    console.print(f"\n{msgspec.json.format(msgspec.json.encode(total), indent=2).decode()}")
    sys.exit(EXIT_WRONG if total.violations else EXIT_NOT_RUN if total.not_run else 0)


class Trial:
    """Run seeds and, on a violation, search for the smallest schedule that shows it."""

    def __init__(self, console: Console, folder: Path, planted: str, shrink_runs: int) -> None:
        self.console = console
        self.folder = folder
        self.planted = planted
        self.shrink_runs = shrink_runs
        self._runs = 0

    def seed(self, schedule: Schedule) -> Summary:
        """Run one schedule, check it, and shrink it on a violation."""
        begun = time.monotonic()
        path, evidence, violations = uvloop.run(self._run(schedule, f"seed-{schedule.seed}"))
        summary = summary_of(evidence, violations)
        _tell(self.console, schedule.seed, summary, violations, time.monotonic() - begun)
        if violations:
            found = Found(seed=schedule.seed, violations=violations[:50], history=str(path))
            self.console.print(f"  history: {path}")
            if self.shrink_runs:
                uvloop.run(self._shrink(schedule, violations[0].rule, found))
            summary.found.append(found)
        return summary

    async def _run(self, schedule: Schedule, name: str) -> tuple[Path, Evidence, list[Violation]]:
        run = Run(schedule, self.folder / name, self.planted)
        async with asyncio.timeout(schedule.seconds + RUN_BOUND):
            evidence = Evidence.of(await run.execute())
        violations = check(evidence)
        if not violations:
            _forget_stores(run.stage.folder)
        return run.history.path, evidence, violations

    async def _shrink(self, schedule: Schedule, rule: str, found: Found) -> None:
        """Search for fewer faults that violate the same rule."""

        async def shows(faults: list[Fault]) -> bool:
            found.runs += 1
            fewer = msgspec.structs.replace(schedule, faults=tuple(faults))
            path, _, violations = await self._run(fewer, f"seed-{schedule.seed}-fewer-{found.runs}")
            same = [v for v in violations if v.rule == rule]
            self.console.print(f"  with {len(faults)} faults: {same[0] if same else 'not seen'}")
            if same:
                found.history = str(path)
            return bool(same)

        smallest = await shrink(schedule.faults, shows, self.shrink_runs)
        found.smallest = [msgspec.json.encode(fault).decode() for fault in smallest]
        self.console.print(f"  smallest schedule that showed it: {len(smallest)} of {len(schedule.faults)} faults")
        for line in found.smallest:
            self.console.print(f"    {line}")
        self.console.print(f"  its history: {found.history}")


def _tell(
    console: Console, seed: int, summary: Summary, violations: list[Violation], took: float | None = None
) -> None:
    faults = sum(summary.faults.values())
    console.print(
        f"seed {seed}: {'VIOLATED' if violations else 'kept'}"
        f" · {summary.requests} requests, {summary.events} events, {summary.received} received, {faults} faults,"
        f" {summary.resumes} resumes, {summary.served} served, {summary.evicted} evicted,"
        f" {summary.takeovers} takeovers, {dict(summary.dropped)} dropped,"
        f" slowest end {summary.slowest_end} s, machine {summary.slowest_machine} times as slow"
        + (f" · {took:.0f} s" if took else "")
    )
    for violation in violations[:SHOWN]:
        console.print(f"  {violation}")
    if len(violations) > SHOWN:
        console.print(f"  … and {len(violations) - SHOWN} more")


def _stop_in_order() -> None:
    """Stop all started processes on SIGTERM as on Ctrl-C."""

    def interrupt(_signum: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _forget_stores(folder: Path) -> None:
    """Keep logs and history of a run, not the broker's files."""
    for store in folder.glob("node-*"):
        if store.is_dir():
            shutil.rmtree(store, ignore_errors=True)
