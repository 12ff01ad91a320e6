"""``python -m bench billing``: measure throughput and processor time of one billing process folding a log.

First a log is filled: generations that stream concurrently, then their usage and their end. Then billing starts with an
empty database and reads the whole log: fetch, fold, commit, acknowledge. On a shared machine the processor time per
event is more reliable than events per second.
"""

import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import click
import msgspec
import sqlalchemy as sa
import uvloop
from rich.console import Console
from rich.table import Table

from bench.billing.log import Shape, fill
from bench.billing.queries import Asked, ask_many
from bench.postgres import CannotStart, Postgres
from bench.processes import Died, Process, Processes, TooLate, fetch, free_port, python
from bench.relay.targets import start_nats
from services.billing.adapters.database import open_engine, reading
from services.billing.adapters.tables import GENERATIONS, LEDGER
from services.billing.database_url import database_url
from services.kit.jetstream.broker import Broker

__all__ = ["billing"]

EXIT_WRONG: Final = 1
EXIT_NOT_RUN: Final = 2
READY_SECONDS: Final = 60.0
FOLD_SECONDS: Final = 900.0
POLL: Final = 0.1
_POSITION: Final = re.compile(rb'tailrace_billing_position_seq\{partition="0"\} ([0-9.e+]+)')
_PRICES: Final = """currency = "USD"
[[price]]
provider = "*"
model = "*"
from = 2020-01-01
input = "2.50"
output = "10"
"""


class Folding(msgspec.Struct, kw_only=True):
    """Result of one run. ``…_us``: processor microseconds per event of billing, the database server and the broker.

    ``right``: the numbers of generations, tokens and ledger entries equal those of the log.
    """

    database: str
    events: int
    generations: int
    seconds: float
    events_per_s: float
    billing_us: float
    database_us: float
    broker_us: float
    right: bool


@click.command()
@click.option("--generations", default=3_000, show_default=True, type=click.IntRange(1), help="Generations in the log.")
@click.option("--deltas", default=60, show_default=True, type=click.IntRange(0), help="Deltas of each generation.")
@click.option("--abreast", default=300, show_default=True, type=click.IntRange(1), help="Concurrent generations.")
@click.option(
    "--database", "only", multiple=True, type=click.Choice(["sqlite", "postgresql"]), help="Only this database."
)
@click.option(
    "--questions",
    type=click.IntRange(1),
    metavar="GENERATIONS",
    help="Measure queries over this many generations instead.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the result as JSON.")
def billing(
    generations: int,
    deltas: int,
    abreast: int,
    only: tuple[str, ...],
    questions: int | None,
    json_file: Path | None,
) -> None:
    """Measure billing: events per second folded into SQLite and PostgreSQL, and processor time per event.

    Exit code: 0 all totals right, 1 wrong totals, 2 the run was not possible.
    """
    shape = Shape(generations=generations, deltas=deltas, abreast=abreast)
    console = Console(width=None if sys.stdout.isatty() else 130)
    if questions is not None:
        _question(console, questions, only or ("postgresql",), json_file)
        return
    try:
        results = [_measure(name, shape) for name in only or ("sqlite", "postgresql")]
    except (Died, TooLate, CannotStart) as error:
        console.print(f"[red]not measured:[/] {error}", highlight=False)
        sys.exit(EXIT_NOT_RUN)
    console.print(_table(results))
    if json_file:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")
    sys.exit(0 if all(r.right for r in results) else EXIT_WRONG)


def _question(console: Console, generations: int, databases: tuple[str, ...], json_file: Path | None) -> None:
    """Show the latency of queries by database."""
    asked: dict[str, list[Asked]] = {}
    for database in databases:
        folder = Path(tempfile.mkdtemp(prefix="tailrace-bench-billing-"))
        try:
            with ExitStack() as stack:
                server = stack.enter_context(Postgres(folder)) if database == "postgresql" else None
                url = database_url(server.url if server else f"sqlite:///{folder}/billing.db")
                asked[database] = uvloop.run(ask_many(url, generations))
        except CannotStart as error:
            console.print(f"[red]not measured:[/] {error}", highlight=False)
            sys.exit(EXIT_NOT_RUN)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        table = Table("question", "median ms", "slowest ms", "rows", title=f"{generations:,} generations, {database}")
        for one in asked[database]:
            table.add_row(one.question, f"{one.median_ms:.1f}", f"{one.slowest_ms:.1f}", str(one.rows))
        console.print(table)
    if json_file:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(asked), indent=2) + b"\n")


def _measure(database: str, shape: Shape) -> Folding:
    folder = Path(tempfile.mkdtemp(prefix="tailrace-bench-billing-"))
    try:
        with ExitStack() as stack:
            env = {name: value for name, value in os.environ.items() if not name.startswith("TAILRACE_")}
            processes = stack.enter_context(Processes(folder, env))
            port = free_port()
            start_nats(processes, port)
            nats = f"nats://127.0.0.1:{port}"
            uvloop.run(_fill(nats, shape))
            server = stack.enter_context(Postgres(folder)) if database == "postgresql" else None
            url = server.url if server else f"sqlite:///{folder}/billing.db"
            return _fold(database, shape, processes, server, url, nats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _fill(nats: str, shape: Shape) -> None:
    async with Broker.connect(nats, "bench") as broker:
        await fill(broker, shape)


def _fold(database: str, shape: Shape, processes: Processes, server: Postgres | None, url: str, nats: str) -> Folding:
    process, port = _start(processes, url, nats)
    broker = processes.all["nats-server"]
    processes.wait(lambda: _position(port) > 0, READY_SECONDS, "billing reads", POLL)
    # Exclude the start, and the events folded before the first poll.
    first, begun = _position(port), time.monotonic()
    spent = (process.spent().cpu, server.cpu() if server else 0.0, broker.spent().cpu)
    processes.wait(lambda: _position(port) >= shape.events, FOLD_SECONDS, "billing has read all", POLL)
    seconds, events = time.monotonic() - begun, max(1, shape.events - first)
    after = (process.spent().cpu, server.cpu() if server else 0.0, broker.spent().cpu)
    own, theirs, brokers = (1e6 * (b - a) / events for a, b in zip(spent, after, strict=True))
    return Folding(
        database=database,
        events=events,
        generations=shape.generations,
        seconds=seconds,
        events_per_s=events / seconds,
        billing_us=own,
        database_us=theirs,
        broker_us=brokers,
        right=uvloop.run(_totals(url)) == (shape.generations, shape.output, shape.generations),
    )


def _start(processes: Processes, url: str, nats: str) -> tuple[Process, int]:
    prices, port = processes.folder / "prices.toml", free_port()
    prices.write_text(_PRICES)
    env = {
        "TAILRACE_NATS_URL": nats,
        "TAILRACE_DATA": str(processes.folder),
        "TAILRACE_LOG_LEVEL": "warning",
        "TAILRACE_BILLING_PORT": str(port),
        "TAILRACE_BILLING_DATABASE_URL": url,
        "TAILRACE_BILLING_PRICES": str(prices),
    }
    return processes.start("billing", python("services.billing"), env), port


def _position(port: int) -> int:
    """Return the stream sequence up to which all events are applied."""
    found = _POSITION.search(fetch(f"http://127.0.0.1:{port}/metrics") or b"")
    return int(float(found[1])) if found else 0


async def _totals(url: str) -> tuple[int, int, int]:
    """Return generations, their output tokens, and ledger entries."""
    sums = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(GENERATIONS.c.output), 0)).select_from(GENERATIONS)
    async with open_engine(database_url(url)) as engine, reading(engine) as connection:
        generations, output = (await connection.execute(sums)).one()
        entries = (await connection.execute(sa.select(sa.func.count()).select_from(LEDGER))).scalar_one()
    return int(generations), int(output), int(entries)


def _table(results: list[Folding]) -> Table:
    table = Table("database", "events", "seconds", "events/s", "billing µs", "database µs", "broker µs", "right")
    for r in results:
        numbers = (r.events, f"{r.seconds:.2f}", f"{r.events_per_s:,.0f}", *(
            f"{x:.1f}" for x in (r.billing_us, r.database_us, r.broker_us)
        ))  # fmt: skip
        table.add_row(r.database, *map(str, numbers), "yes" if r.right else "NO")
    return table
