"""Test old backups, logs with lost events, and rebuilding from the log."""

import asyncio
import shutil
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa

from schemas.events import Completed, Delta, Failed, UsageReported
from schemas.topology import Topology
from schemas.usage import Usage
from services.billing.adapters.balances import Balances
from services.billing.adapters.database import migrate, open_engine, reading, writing
from services.billing.adapters.imports import Imports
from services.billing.adapters.ledger import UNHEARD, Ledger
from services.billing.adapters.prices import Prices
from services.billing.adapters.tables import GAPS, GENERATIONS, LEDGER, SPENDING
from services.billing.adapters.tail import Tail
from services.billing.core.generation import Key
from services.billing.core.provider_export import parse_export
from services.billing.database_url import database_url
from services.billing.rebuild import Held, Rebuild, Rebuilt
from services.billing.sweep import Sweep
from services.billing.terms import CurrentTerms
from services.kit.clock import SystemClock
from services.kit.jetstream.broker import Broker
from services.kit.jetstream.logs import Logs
from tests.conftest import eventually
from tests.support.billing_histories import history, restarted_history
from tests.support.billing_prices import price
from tests.support.billing_process import Process, Scenario, running, sqlite, write, write_surely
from tests.support.postgres import postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]
ROWS = [price("input", "2.50"), price("output", "10")]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return sqlite(tmp_path) if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))


async def priced(url: str) -> None:
    async with open_engine(database_url(url)) as engine:
        await migrate(engine)
        await Prices(engine).put(ROWS, source="test", digest="-", now=1)


async def billed(broker: Broker, url: str, scenario: Scenario) -> None:
    async with running(broker, url) as run:
        await eventually(lambda: scenario.settled(run.reports), timeout=30)


async def rebuilt(broker: Broker, url: str) -> Rebuilt:
    async with open_engine(database_url(url)) as engine:
        await migrate(engine)
        tail = Tail(broker, Topology(), 0, batch=100, interval=0.05)
        ledger = Ledger(engine, "rebuild", hold=30)
        return await Rebuild(0, tail, ledger, CurrentTerms(Prices(engine)), SystemClock()).run()


async def numbers(url: str) -> tuple[dict[str, object], dict[str, object], list[object]]:
    """Return each generation's numbers, the ledger's sums and the sums of spending."""
    wanted = ("status", "counted_output", "output", "pricing", "amount", "currency", "tokens", "usage_source")
    async with open_engine(database_url(url)) as engine, reading(engine) as connection:
        rows = await connection.execute(sa.select(GENERATIONS.c.generation, *(GENERATIONS.c[n] for n in wanted)))
        generations = {row[0]: tuple(row[1:]) for row in rows}
        sums = await connection.execute(
            sa.select(LEDGER.c.generation, sa.func.sum(LEDGER.c.amount)).group_by(LEDGER.c.generation)
        )
        ledger = {row[0]: row[1] for row in sums}
        columns = (SPENDING.c.day, SPENDING.c.currency, SPENDING.c.tokens, SPENDING.c.amount)
        spent = sorted(tuple(row) for row in await connection.execute(sa.select(*columns)) if row.tokens or row.amount)
        return generations, ledger, list(spent)


async def change(url: str, *statements: sa.Executable) -> None:
    async with open_engine(database_url(url)) as engine, writing(engine) as connection:
        for statement in statements:
            await connection.execute(statement)


async def test_a_rebuild_of_a_correct_ledger_changes_nothing(broker: Broker, database: str) -> None:
    scenario = Scenario(41)
    await priced(database)
    await write(broker, scenario.events)
    await billed(broker, database, scenario)
    before = await numbers(database)
    found = await rebuilt(broker, database)
    assert (found.changed, found.entries, found.names) == (0, 0, [])
    assert (found.events, found.generations) == (len(scenario.events), len(scenario.expected))
    assert not found.missing_before
    assert await numbers(database) == before


async def test_a_rebuild_restores_altered_generations_and_corrects_with_entries(broker: Broker, database: str) -> None:
    scenario = Scenario(42)
    await priced(database)
    await write(broker, scenario.events)
    await billed(broker, database, scenario)
    right = await numbers(database)
    matched = [name for name, (status, _, _) in scenario.expected.items() if status == "matched"]
    g = GENERATIONS
    await change(
        database,
        sa.update(g).where(g.c.generation == matched[0]).values(counted_output=1, output=2, status="drift"),
        sa.update(g).where(g.c.generation == matched[1]).values(amount=Decimal(77)),
        sa.delete(g).where(g.c.generation == matched[2]),
    )
    found = await rebuilt(broker, database)
    assert sorted(found.names) == sorted(matched[:3])
    assert found.entries == 0
    generations, ledger, _spent = await numbers(database)
    assert (generations, ledger) == right[:2]


async def test_a_rebuild_of_an_empty_database_equals_the_result_of_the_service(
    broker: Broker, database: str, tmp_path: Path
) -> None:
    scenario = Scenario(43)
    other = f"sqlite:///{tmp_path}/other.db"
    await priced(database)
    await priced(other)
    await write(broker, scenario.events)
    await billed(broker, database, scenario)
    assert (await rebuilt(broker, other)).changed == len(scenario.expected)
    assert await numbers(other) == await numbers(database)


async def test_a_rebuild_keeps_usage_from_an_export(broker: Broker, database: str) -> None:
    events = history("gen_1", reported=Usage(input=7, output=30))
    await priced(database)
    await write(broker, events)
    async with running(broker, database) as run:
        await eventually(lambda: run.consumer.applied == len(events))
        rows = parse_export("json", b'[{"generation": "gen_1", "input": 7, "output": 90}]')
        terms = run.consumer.terms.now
        await Imports(run.ledger.engine).put("default", rows, source="test", now=1, terms=terms)

        async def corrected() -> bool:
            g = await run.reports.generation("default", "gen_1")
            return g is not None and g.output == 90

        await eventually(corrected)
    before = await numbers(database)
    assert (await rebuilt(broker, database)).changed == 0
    assert await numbers(database) == before


async def test_a_rebuild_finds_abandoned_calls_again_and_keeps_their_exported_usage(
    broker: Broker, database: str, tmp_path: Path
) -> None:
    told = restarted_history("gen_1", reported=Usage(input=7, output=20))
    lost = restarted_history("gen_2", terminal=Failed, is_told=False)
    await priced(database)
    await write(broker, [*told, *lost])
    async with running(broker, database) as run:
        await eventually(lambda: run.consumer.applied == len(told) + len(lost))
        terms = run.consumer.terms.now
        rows = parse_export("json", b'[{"id": "up-1", "input": 7, "output": 90}]')
        await Imports(run.ledger.engine).put("default", rows, source="test", now=1, terms=terms)

        async def corrected() -> bool:
            g = await run.reports.generation("default", "gen_1")
            return g is not None and g.output == 110

        await eventually(corrected)
    before = await numbers(database)
    assert [before[0][name][6] for name in ("gen_1", "gen_2")] == [97 + 27 + 27, 3 * 27]  # type: ignore[index]
    found = await rebuilt(broker, database)
    assert (found.changed, found.entries, found.names) == (0, 0, [])
    assert await numbers(database) == before
    other = f"sqlite:///{tmp_path}/other.db"
    await priced(other)
    await rebuilt(broker, other)
    assert (await numbers(other))[0]["gen_2"] == before[0]["gen_2"]


async def test_a_rebuild_is_refused_while_billing_runs(broker: Broker, database: str) -> None:
    await write(broker, history("gen_1"))
    async with running(broker, database) as run:
        await eventually(lambda: run.consumer.applied > 0)
        with pytest.raises(Held):
            await rebuilt(broker, database)


async def test_an_old_backup_catches_up_from_the_log(broker: Broker, tmp_path: Path) -> None:
    scenario = Scenario(44)
    url = sqlite(tmp_path)
    await priced(url)
    half = len(scenario.events) // 2
    await write(broker, scenario.events[:half])
    async with running(broker, url) as run:
        await eventually(lambda: run.consumer.applied == half)
    shutil.copy(tmp_path / "billing.db", tmp_path / "backup.db")
    await write(broker, scenario.events[half:])
    await billed(broker, url, scenario)
    right = await numbers(url)
    for leftover in ("billing.db", "billing.db-wal", "billing.db-shm"):
        (tmp_path / leftover).unlink(missing_ok=True)
    shutil.move(tmp_path / "backup.db", tmp_path / "billing.db")
    await billed(broker, url, scenario)
    assert await numbers(url) == right


async def test_events_lost_from_the_log_are_a_gap_and_their_generations_continue(broker: Broker, database: str) -> None:
    events = history("gen_1", deltas=10, reported=Usage(input=7, output=100))
    await write(broker, events[:4])
    async with running(broker, database) as run:
        await eventually(lambda: run.consumer.applied == 4)
    await write_surely(broker, events[4:8])
    await broker.js.purge_stream("TOKENS_0", seq=9)
    await write(broker, events[8:])
    async with running(broker, database) as run:

        async def matched() -> bool:
            g = await run.reports.generation("default", "gen_1")
            return g is not None and (g.status, g.counted_output, g.headless) == ("matched", 100, True)

        await eventually(matched)
        async with reading(run.ledger.engine) as connection:
            [gap] = (await connection.execute(sa.select(GAPS.c.first, GAPS.c.last))).all()
    assert tuple(gap) == (1, 8)  # nothing is left of what billing had read, as after damage


async def test_a_generation_whose_terminal_is_in_a_gap_is_settled_as_partial(broker: Broker, database: str) -> None:
    await priced(database)
    await write(broker, history("gen_1", deltas=3, terminal=None))
    async with running(broker, database) as run:
        await eventually(lambda: run.consumer.applied == 4)
    await write_surely(broker, [Completed(generation="gen_1", seq=4, finish_reason="stop")])
    await broker.js.purge_stream("TOKENS_0", seq=6)
    await write(broker, [Delta(generation="gen_2", seq=0, text="x", tokens=1)])
    async with running(broker, database) as run:
        await eventually(lambda: run.consumer.applied == 6)
    now = round(time.time() * 1_000)
    async with open_engine(database_url(database)) as engine:
        ledger = Ledger(engine, "later")
        key = Key("default", "s1", "gen_1")
        assert await ledger.acquire(0, (await Logs(broker).state(0)).incarnation, now) == 6
        terms = CurrentTerms(Prices(engine))
        await terms.refresh()
        sweep = Sweep(0, ledger, terms)
        assert await sweep.run(6, now, 5) == []
        assert await sweep.run(6, now + UNHEARD, 5) == [key]
        g = (await ledger.load([key]))[key]
        assert (g.status, g.code, g.pricing) == ("partial", "log_expired", "charged")
        assert (await Balances(engine).of([key]))[key].amount == g.amount


async def test_late_usage_after_a_gap_is_applied(broker: Broker, database: str) -> None:
    events = history("gen_1", deltas=3)
    await write(broker, events)
    async with running(broker, database) as run:
        await eventually(lambda: run.consumer.applied == len(events))
    late = [
        UsageReported(generation="gen_1", seq=len(events) + at, usage=Usage(input=7, output=30 + at)) for at in range(2)
    ]
    await write_surely(broker, late[:1])
    await broker.js.purge_stream("TOKENS_0", seq=len(events) + 2)
    await write(broker, late[1:])
    async with running(broker, database) as run:

        async def taken() -> bool:
            g = await run.reports.generation("default", "gen_1")
            return g is not None and g.output == 31 and g.state == "completed"

        await eventually(taken)


async def test_the_command_rebuilds_every_partition(broker: Broker, nats_url: str, tmp_path: Path) -> None:
    scenario = Scenario(45, generations=10)
    await write(broker, scenario.events)
    process = Process(nats_url, tmp_path, sqlite(tmp_path))

    async def run() -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "services.billing", "rebuild"]
        return await asyncio.to_thread(
            subprocess.run, command, env=process.env, capture_output=True, timeout=60, check=False
        )

    first, second = await run(), await run()
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert b"generations: 10, set right: 10," in first.stdout
    assert b"generations: 10, set right: 0, entries written: 0" in second.stdout
