"""The harness that all measuring commands share: options, process limits, folders, tables, exit codes."""

import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol, TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table

from bench.machine import Machine
from bench.peers import PeerNotInstalled
from bench.processes import Died, Processes, TooLate
from bench.profiling import Profile, ProfilerMissing, top_costs

__all__ = [
    "EXIT_NOT_RUN",
    "TooFewDescriptors",
    "chosen_scenarios",
    "common_options",
    "listed",
    "measuring",
    "prepare",
    "processes_in",
    "show_machine",
    "show_profile",
    "show_verdicts",
    "table",
]

EXIT_WRONG: Final = 1
EXIT_NOT_RUN: Final = 2
EXIT_TARGETS_MISSED: Final = 3
DESCRIPTORS: Final = 65_536
SPARE: Final = 1_000
"""File descriptors that a command needs beside those of its connections."""

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound="_Scenario")


class _Scenario(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...


class _Measured(Protocol):
    @property
    def targets_met(self) -> dict[str, bool]: ...


class _Report(Protocol):
    @property
    def good(self) -> bool: ...

    @property
    def scenarios(self) -> Sequence[_Measured]: ...


class TooFewDescriptors(Exception):
    """The system does not allow as many open connections as a scenario has."""


def listed(scenarios: Mapping[str, _Scenario], width: int) -> str:
    """Return the scenarios as a list for a command's help text."""
    lines = "\n".join(f"  {s.name:<{width}} {s.about}" for s in scenarios.values())
    return f"\b\n{lines}\n  {'all':<{width}} every one but smoke"


def chosen_scenarios(scenarios: Mapping[str, S], asked: Sequence[str], changes: Mapping[str, object]) -> list[S]:
    """Return the scenarios to run, with the options that were given; ``all`` means every one but ``smoke``."""
    every = [name for name in scenarios if not name.endswith("smoke")]
    names = [name for word in asked for name in (every if word == "all" else [word])]
    given = {name: value for name, value in changes.items() if value is not None}
    return [msgspec.structs.replace(scenarios[name], **given) for name in names]  # type: ignore[type-var]  # structs


def common_options(command: F) -> F:
    """Add the options that all measuring commands have."""
    options = (
        click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write JSON here."),
        click.option("--profile-file", type=click.Path(path_type=Path), help="Folded stacks; default: PROCESS.folded"),
        click.option(
            "--keep", type=click.Path(path_type=Path, exists=False), help="Leave logs and data in this new folder."
        ),
        click.option("--strict", is_flag=True, help="Exit with 3 when a target is missed."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def prepare(streams: int = 0) -> None:
    """Allow a file descriptor for every connection, and stop in order on SIGTERM as on Ctrl-C.

    Raises:
        TooFewDescriptors: the system does not allow ``streams`` connections.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if streams + SPARE > limit:
        raise TooFewDescriptors(f"{streams:,} connections need `ulimit -Hn` of {streams + SPARE:,}; it is {limit:,}")

    def interrupt(_signum: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@contextmanager
def measuring(console: Console, report: _Report, json_file: Path | None, *, strict: bool) -> Iterator[None]:
    """Run a command's measurements, write ``report``, and exit with the code that it earned."""
    try:
        yield
    except (Died, TooLate, PeerNotInstalled, ProfilerMissing, TooFewDescriptors) as error:
        console.print(f"not measured: {error}", style="red", markup=False, highlight=False)
        sys.exit(EXIT_NOT_RUN)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if json_file:
            json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if not report.good:
        sys.exit(EXIT_WRONG)
    if strict and not all(met for s in report.scenarios for met in s.targets_met.values()):
        sys.exit(EXIT_TARGETS_MISSED)
    sys.exit(0)


@contextmanager
def processes_in(keep: Path | None, name: str) -> Iterator[Processes]:
    """Run processes in a folder below ``keep``, or in a temporary one, without the caller's settings of Tailrace."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TAILRACE_")}
    with ExitStack() as stack:
        if keep:
            folder = keep / name
            folder.mkdir(parents=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tailrace-bench-")))
        yield stack.enter_context(Processes(folder, env))


def show_machine(console: Console, m: Machine) -> None:
    """Print the machine that is measured on."""
    console.print(f"{m.cores} cores, {m.processor}, {m.memory_gb:g} GB, {m.system}, Python {m.python}", highlight=False)


def show_verdicts(console: Console, not_measured: Mapping[str, str], targets_met: Mapping[str, bool]) -> None:
    """Print what could not be measured, and each target with its result."""
    for name, reason in not_measured.items():
        console.print(f"{name}: not measured: {reason}", markup=False, highlight=False)
    for text, met in targets_met.items():
        console.print(f"{'[green]met   [/]' if met else '[red]missed[/]'} {text}", highlight=False)


def show_profile(console: Console, profile: Profile | None) -> None:
    """Print the functions that cost most, if a profile was written."""
    if profile is None or not profile.path.exists():
        return
    console.print(f"\n[bold]{profile.name}[/]: percent in itself and with what it calls ({profile.path})")
    for share in top_costs(profile.path):
        console.print(f"{share.own:6.1f} {share.total:6.1f}  {share.name}", markup=False, highlight=False)


def table(*columns: str) -> Table:
    """Return an empty table: the first column is left-aligned, the others are numbers."""
    made = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        made.add_column(column, justify="right", no_wrap=True)
    return made
