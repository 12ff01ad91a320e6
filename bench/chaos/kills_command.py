"""The command ``python -m bench billing-kills``."""

import shutil
import sys
import tempfile
from pathlib import Path

import click
import msgspec
from rich.console import Console

from bench.chaos.kills import Kills, Outcome
from bench.processes import Died, TooLate
from services.kit.telemetry import configure_logging

__all__ = ["billing_kills"]

EXIT_WRONG = 1
EXIT_NOT_RUN = 2
SHOWN = 10


@click.command(
    help="""Kill billing at random, and compare its amounts with a count over the log.

Two billing processes on one SQLite database are killed (SIGKILL) and restarted while generations are written directly
to the log. In the end rows, ledger and sums must equal those of an independent fold of the log. See docs/chaos.md.

Exit code: 0 all totals equal, 1 totals differ, 2 the run was not possible.
"""
)
@click.option(
    "--generations", default=10_000, show_default=True, type=click.IntRange(1), help="Generations in the log."
)
@click.option(
    "--seconds", default=90.0, show_default=True, type=click.FloatRange(1), help="Duration of writing the log."
)
@click.option("--seed", default=1, show_default=True, help="Seed of the log and of the kills.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the result as JSON.")
@click.option(
    "--keep", type=click.Path(path_type=Path, exists=False), help="Keep logs and database in this new folder."
)
def billing_kills(  # noqa: D103  # the text is that of the decorator
    generations: int, seconds: float, seed: int, json_file: Path | None, keep: Path | None
) -> None:
    configure_logging("bench", "error", "console")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    folder = keep or Path(tempfile.mkdtemp(prefix="tailrace-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    wrong = True
    try:
        outcome = Kills(folder, seed, generations, seconds).execute()
        wrong = bool(outcome.violations)
    except (Died, TooLate) as error:
        console.print(f"not run: {error}")
        sys.exit(EXIT_NOT_RUN)
    finally:
        if keep is None and not wrong:
            shutil.rmtree(folder, ignore_errors=True)
    if json_file:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(outcome), indent=2) + b"\n")
    _tell(console, outcome)
    if wrong:
        console.print(f"  logs and database: {folder}")
        sys.exit(EXIT_WRONG)


def _tell(console: Console, outcome: Outcome) -> None:
    console.print(
        f"seed {outcome.seed}: {'DIFFERENT' if outcome.violations else 'equal'}"
        f" · {outcome.generations} generations, {outcome.messages} messages, {outcome.events} of them accepted,"
        f" {outcome.kills} kills, {outcome.exports} exports, {outcome.entries} entries,"
        f" {outcome.amount} USD, {outcome.tokens} tokens, {outcome.statuses} · {outcome.seconds:.0f} s"
    )
    for violation in outcome.violations[:SHOWN]:
        console.print(f"  {violation}")
    if len(outcome.violations) > SHOWN:
        console.print(f"  … and {len(outcome.violations) - SHOWN} more")
