"""The ledger on SQLite and PostgreSQL: the same suite on both."""

import asyncio

import msgspec
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.ext.asyncio import AsyncEngine

from bench.processes import free_port
from schemas.usage import Usage
from services.billing.adapters.database import migrate, open_engine, reading
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.reports import Reports
from services.billing.adapters.tables import metadata
from services.billing.adapters.worklist import Worklist
from services.billing.core.fold import fold
from services.billing.core.generation import Generation, Key
from services.billing.core.question import Filters
from services.billing.core.reconciliation import Policy, reconcile
from services.billing.database_url import database_url
from services.billing.errors import Fenced, LedgerUnavailable
from tests.support.billing_database import database, empty_database, engine, postgres_server, postgres_url
from tests.support.billing_histories import START, address, history, records

__all__ = ["database", "empty_database", "engine", "postgres_server", "postgres_url"]
NOW = round(START * 1_000) + 10_000


def generation(name: str = "g", *, session: str = "s", **made) -> Generation:  # type: ignore[no-untyped-def]
    g = fold(None, address(name, session), records(history(name, **made), place=address(name, session))).generation
    assert g is not None
    return reconcile(g, NOW, Policy())


@pytest.fixture
def ledger(engine: AsyncEngine) -> Ledger:
    return Ledger(engine, "one")


async def test_migrations_create_exactly_the_tables_of_the_metadata(engine: AsyncEngine) -> None:
    async with reading(engine) as connection:
        difference = await connection.run_sync(lambda c: compare_metadata(MigrationContext.configure(c), metadata))
    assert difference == []


async def test_migrating_again_and_at_once_changes_nothing(empty_database: str) -> None:
    async with open_engine(database_url(empty_database)) as one, open_engine(database_url(empty_database)) as two:
        await asyncio.gather(migrate(one), migrate(two))
        await migrate(two)
        async with reading(one) as connection:
            found = await connection.execute(sa.text("SELECT count(*) FROM alembic_version"))
            assert found.scalar_one() == 1


async def test_a_row_round_trips(ledger: Ledger) -> None:
    assert await ledger.acquire(0, "first", NOW) == 0
    g = generation(reported=Usage(input=7, output=30, cached_input=2, cost="0.0001", raw={"a": "\0 ü"}))
    h = generation("h", terminal=None)
    await ledger.commit(0, (0, 9), NOW, [g, h])
    assert await ledger.load([g.key, h.key, Key("default", "s", "other")]) == {g.key: g, h.key: h}
    assert await ledger.acquire(0, "first", NOW) == 9
    assert await ledger.running() == 1


async def test_numbers_up_to_the_largest_event_number_fit(ledger: Ledger) -> None:
    await ledger.acquire(0, "first", NOW)
    g = msgspec.structs.replace(generation(), counted_output=2**53, log_seq=2**53)
    await ledger.commit(0, (0, 2**53), NOW, [g])
    assert (await ledger.load([g.key]))[g.key] == g


async def test_progress_updates_position_and_count_of_an_existing_row(ledger: Ledger) -> None:
    await ledger.acquire(0, "first", NOW)
    before, after = generation(terminal=None), generation(terminal=None, deltas=9)
    await ledger.commit(0, (0, 4), NOW, [before])
    await ledger.commit(0, (4, 10), NOW, (), [after])
    assert (await ledger.load([after.key]))[after.key] == after


async def test_many_rows_are_written_and_loaded(ledger: Ledger) -> None:
    await ledger.acquire(0, "first", NOW)
    rows = [generation(f"g{n}", session=f"s{n % 7}") for n in range(1_300)]
    await ledger.commit(0, (0, 6_500), NOW, rows)
    assert len(await ledger.load([g.key for g in rows])) == 1_300


async def test_a_batch_from_a_wrong_position_writes_nothing(ledger: Ledger) -> None:
    await ledger.acquire(0, "first", NOW)
    await ledger.commit(0, (0, 5), NOW, [generation("g")])
    with pytest.raises(Fenced):
        await ledger.commit(0, (0, 5), NOW, [generation("h")])
    assert len(await ledger.load([Key("default", "s", "g"), Key("default", "s", "h")])) == 1


async def test_a_partition_has_one_holder_until_its_hold_expires_or_is_released(engine: AsyncEngine) -> None:
    one, two = Ledger(engine, "one", hold=5), Ledger(engine, "two", hold=5)
    assert await one.acquire(0, "first", NOW) == 0
    assert await two.acquire(0, "first", NOW + 4_000) is None
    assert await one.acquire(0, "first", NOW + 4_000) == 0
    assert await two.acquire(0, "first", NOW + 8_000) is None
    assert await two.acquire(0, "first", NOW + 9_001) == 0
    with pytest.raises(Fenced):
        await one.commit(0, (0, 3), NOW + 9_002, [generation()])
    await one.release(0)
    assert await one.acquire(0, "first", NOW + 9_003) is None
    await two.release(0)
    assert await one.acquire(0, "first", NOW + 9_004) == 0


async def test_only_one_of_several_concurrent_commits_succeeds(engine: AsyncEngine) -> None:
    ledgers = [Ledger(engine, f"process-{n}") for n in range(4)]
    taken = await asyncio.gather(*(one.acquire(0, "first", NOW) for one in ledgers))
    assert sorted(taken, key=str) == [0, None, None, None]
    holder = ledgers[taken.index(0)]
    outcomes = await asyncio.gather(
        *(holder.commit(0, (0, 5), NOW, [generation(f"g{n}")]) for n in range(4)), return_exceptions=True
    )
    assert sorted(type(o).__name__ for o in outcomes) == ["Fenced", "Fenced", "Fenced", "list"]
    assert (await Reports(engine).totals(Filters(tenant="default"))).generations == 1


async def test_a_recreated_stream_is_read_from_its_beginning(ledger: Ledger) -> None:
    await ledger.acquire(0, "first", NOW)
    await ledger.commit(0, (0, 50), NOW, [generation()])
    assert await ledger.acquire(0, "second", NOW) == 0
    assert len(await ledger.load([Key("default", "s", "g")])) == 1


async def test_generations_are_due_when_their_grace_has_passed(ledger: Ledger) -> None:
    await ledger.acquire(0, "first", NOW)
    waiting = generation("waits")
    assert waiting.settle_at is not None
    await ledger.commit(0, (0, 5), NOW, [waiting, generation("ok", reported=Usage(input=7, output=30))])
    worklist = Worklist(ledger.engine)
    assert await worklist.due(0, waiting.settle_at - 1) == []
    assert await worklist.due(0, waiting.settle_at) == [waiting]
    assert await worklist.due(1, waiting.settle_at) == []


@pytest.mark.parametrize("url", ["sqlite:////proc/no/such/file.db", "postgresql://postgres@127.0.0.1:{port}/nothing"])
async def test_an_unreachable_database_raises_ledger_unavailable(url: str) -> None:
    try:
        async with open_engine(database_url(url.format(port=free_port()))) as engine:
            with pytest.raises(LedgerUnavailable):
                await Ledger(engine, "one").answers()
    except OSError:
        assert url.startswith("sqlite")
