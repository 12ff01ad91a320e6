"""The ledger's money, the price book, exports and migrations, on SQLite and PostgreSQL."""

import asyncio
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from schemas.events import Failed, UsageReported
from schemas.usage import Usage
from services.billing.adapters.database import SCRIPTS, migrate, open_engine, reading, writing
from services.billing.adapters.entries import Entries
from services.billing.adapters.imports import Imported, Imports
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.prices import Prices
from services.billing.adapters.reports import Reports
from services.billing.adapters.tables import GENERATIONS, LEDGER, PRICES
from services.billing.adapters.worklist import Money, Worklist
from services.billing.core.charging import Entry
from services.billing.core.fold import fold
from services.billing.core.generation import Generation, Key
from services.billing.core.prices import Price
from services.billing.core.provider_export import parse_export
from services.billing.core.question import Filters
from services.billing.core.settlement import settle
from services.billing.core.spending import steps
from services.billing.database_url import database_url
from services.billing.errors import LedgerUnavailable, StalePrices
from services.billing.price_loading import SHIPPED_FILE, load_price_file, load_shipped_prices, read_price_file
from services.billing.sweep import Sweep
from services.billing.terms import CurrentTerms
from services.kit.clock import SystemClock
from tests.support.billing_database import database, empty_database, engine, postgres_server, postgres_url
from tests.support.billing_histories import START, address, history, records
from tests.support.billing_prices import BOOK_TOML, SINCE, price

__all__ = ["database", "empty_database", "engine", "postgres_server", "postgres_url"]
NOW = round(START * 1_000) + 10_000
ROWS = [price("input", "2.50"), price("output", "10")]


class Books:
    """A partition held by this process, with its prices."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.ledger = Ledger(engine, "test")
        self.prices = Prices(engine)
        self.terms = CurrentTerms(self.prices)
        self.entries = Entries(engine)
        self.imports = Imports(engine)
        self.sweep = Sweep(0, self.ledger, self.terms)
        self.position = 0

    async def put(self, rows: list[Price], dry_run: bool = False):  # type: ignore[no-untyped-def]
        return await self.prices.put(rows, source="test", digest="-", now=NOW, dry_run=dry_run)

    async def take(self, *made: Generation) -> None:
        """Write generations as the consumer does."""
        terms = await self.terms.refresh()
        done = [settle(g, NOW, terms) for g in made]
        before, self.position = self.position, self.position + 10
        entries = [e for _, some in done for e in some]
        money = Money(revision=terms.book.revision, entries=entries, spending=steps({}, [g for g, _ in done]))
        await self.ledger.commit(0, (before, self.position), NOW, [g for g, _ in done], (), money)

    async def swept(self) -> None:
        await self.sweep.run(self.position, NOW)

    async def bring(self, *rows: dict[str, object], dry_run: bool = False) -> Imported:
        exported = parse_export("json", msgspec.json.encode(rows), "openai")
        terms = await self.terms.refresh()
        return await self.imports.put("default", exported, source="test", now=NOW, terms=terms, dry_run=dry_run)

    async def bill(self, name: str = "g") -> list[tuple[str, str]]:
        entries = await self.entries.of(Key("default", "s", name))
        return [(e.kind, f"{e.amount.normalize():f}") for e in entries]

    async def row(self, name: str = "g") -> Generation:
        key = Key("default", "s", name)
        return (await self.ledger.load([key]))[key]


@pytest.fixture
async def books(engine: AsyncEngine) -> Books:
    made = Books(engine)
    assert await made.ledger.acquire(0, "first", NOW) == 0
    return made


def folded(name: str = "g", **made) -> Generation:  # type: ignore[no-untyped-def]
    made.setdefault("reported", Usage(input=8, output=31))
    g = fold(None, address(name), records(history(name, **made), place=address(name))).generation
    assert g is not None
    return g


def entry(number: int, amount: str) -> Entry:
    return Entry(
        tenant="default",
        session="s",
        generation="g",
        number=number,
        kind="charge",
        amount=Decimal(amount),
        currency="USD",
        source="counted",
        rule="test",
        lines="[]",
        revision=0,
        created_at=NOW,
    )


async def test_amounts_are_stored_and_summed_exactly(books: Books) -> None:
    amounts = ["0.000000000001", "8999999.999999999999", "-8999999.999999999999", "0.1", "0.2"]
    money = Money(revision=0, entries=[entry(n, a) for n, a in enumerate(amounts, 1)])
    await books.ledger.commit(0, (0, 1), NOW, (), (), money)
    assert [e.amount for e in await books.entries.of(Key("default", "s", "g"))] == [Decimal(a) for a in amounts]
    async with reading(books.engine) as connection:
        total = (await connection.execute(sa.select(sa.func.sum(LEDGER.c.amount)))).scalar_one()
    assert total == Decimal("0.300000000001")


@pytest.mark.parametrize("table", ["ledger", "prices", "price_withdrawals", "price_revisions"])
@pytest.mark.parametrize("change", ["UPDATE {table} SET revision = 5", "DELETE FROM {table}"])
async def test_append_only_rows_cannot_be_changed(books: Books, table: str, change: str) -> None:
    await books.put(ROWS)
    await books.take(folded())
    await books.put(ROWS[:1])
    with pytest.raises(LedgerUnavailable, match="takes new rows only"):
        async with writing(books.engine) as connection:
            await connection.execute(sa.text(change.format(table=table)))


async def test_an_entry_is_written_once(books: Books) -> None:
    await books.ledger.commit(0, (0, 1), NOW, (), (), Money(revision=0, entries=[entry(1, "1")]))
    with pytest.raises(LedgerUnavailable):
        await books.ledger.commit(0, (1, 2), NOW, (), (), Money(revision=0, entries=[entry(1, "1")]))
    assert len(await books.bill()) == 1
    assert await books.ledger.acquire(0, "first", NOW) == 1


async def test_a_batch_priced_by_an_old_price_book_is_not_committed(books: Books) -> None:
    await books.put(ROWS)
    with pytest.raises(StalePrices):
        await books.ledger.commit(0, (0, 1), NOW, [folded()], (), Money(revision=0))
    assert await books.ledger.load([Key("default", "s", "g")]) == {}


async def test_a_repeated_price_book_keeps_equal_rows_and_withdraws_changed_rows(books: Books) -> None:
    first = await books.put(ROWS)
    assert (first.revision, first.added, first.withdrawn, first.kept) == (1, 2, 0, 0)
    again = await books.put(list(reversed(ROWS)))
    assert (again.revision, again.added, again.withdrawn, again.kept) == (1, 0, 0, 2)
    dearer = [ROWS[0], price("output", "12")]
    dry = await books.put(dearer, dry_run=True)
    assert (dry.revision, dry.added, dry.withdrawn, dry.dry_run) == (2, 1, 1, True)
    assert len((await books.prices.book()).prices) == 2
    assert (await books.prices.book()).revision == 1
    assert msgspec.structs.replace(await books.put(dearer), dry_run=True) == dry
    history = await books.prices.history()
    assert [(k.price.amount, k.revision, k.withdrawn) for k in history] == [
        (Decimal("2.5"), 1, None),
        (Decimal(10), 1, 2),
        (Decimal(12), 2, None),
    ]


async def test_shipped_prices_are_loaded_once_and_withdrawn_when_disabled(books: Books) -> None:
    clock = SystemClock()
    first = await load_shipped_prices(books.prices, clock, wanted=True)
    assert first is not None
    assert (first.revision, first.withdrawn) == (1, 0)
    again = await load_shipped_prices(books.prices, clock, wanted=True)
    assert again is not None
    assert (again.revision, again.added, again.kept) == (1, 0, first.added)
    assert len((await books.prices.book()).prices) == first.added
    off = await load_shipped_prices(books.prices, clock, wanted=False)
    assert off is not None
    assert (off.revision, off.withdrawn) == (2, first.added)
    assert (await load_shipped_prices(books.prices, clock, wanted=False)) == msgspec.structs.replace(off, withdrawn=0)
    assert (await books.prices.book()).prices == ()
    assert await load_shipped_prices(books.prices, clock, wanted=True) is not None
    assert len((await books.prices.book()).prices) == first.added


@pytest.mark.parametrize("own", [ROWS, []])
async def test_shipped_prices_never_replace_the_users_price_book(books: Books, own: list[Price]) -> None:
    await load_shipped_prices(books.prices, SystemClock(), wanted=True)
    await books.put(own)
    for wanted in (True, False):
        assert await load_shipped_prices(books.prices, SystemClock(), wanted=wanted) is None
    assert [p.content() for p in (await books.prices.book()).prices] == [p.content() for p in own]


async def test_shipped_prices_loaded_by_the_user_count_as_user_prices(books: Books) -> None:
    await load_shipped_prices(books.prices, SystemClock(), wanted=True)
    mine = list((await books.prices.book()).prices)
    assert (await books.put(mine)).added == 0
    assert await load_shipped_prices(books.prices, SystemClock(), wanted=False) is None
    assert len((await books.prices.book()).prices) == len(mine)


async def test_a_price_file_wins_over_shipped_prices(books: Books, tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(BOOK_TOML)
    await load_shipped_prices(books.prices, SystemClock(), wanted=True)
    await load_price_file(books.prices, file, SystemClock())
    assert await load_shipped_prices(books.prices, SystemClock(), wanted=True) is None
    assert {p.model for p in (await books.prices.book()).prices} == {"gpt*"}


async def test_shipped_prices_loaded_by_two_processes_at_once_are_there_once(books: Books) -> None:
    clock = SystemClock()
    await asyncio.gather(*(load_shipped_prices(Prices(books.engine), clock, wanted=True) for _ in range(4)))
    rows = [p.content() for p in (await books.prices.book()).prices]
    assert len(rows) == len(set(rows)) == len(read_price_file(SHIPPED_FILE)[0])


async def test_one_hour_cache_writes_are_stored_and_summed_separately(books: Books) -> None:
    usage = Usage(input=90, output=30, cached_input=10, cache_write=60, cache_write_1h=40)
    await books.put([*ROWS, price("cache_write", "3"), price("cache_write_1h", "5")])
    await books.take(folded(reported=usage), folded("other", reported=Usage(input=8, output=30)))
    row = await books.row()
    assert (row.cache_write, row.cache_write_1h) == (60, 40)
    expected = (20 + 10) * Decimal("2.50") + 20 * 3 + 40 * 5 + 30 * 10
    assert row.amount == expected / 1_000_000
    totals = await Reports(books.engine).totals(Filters(tenant="default"))
    assert (totals.cache_write, totals.cache_write_1h) == (60, 40)


async def test_an_unpriced_generation_is_charged_once_a_price_is_loaded(books: Books) -> None:
    await books.take(folded(), folded("other", provider="else"))
    assert ((await books.row()).pricing, await books.bill()) == ("unpriced", [])
    assert (await books.put(ROWS, dry_run=True)).resettled == 1
    await books.put(ROWS)
    await books.swept()
    assert await books.bill() == [("charge", "0.00033")]
    assert (await books.row("other")).pricing == "unpriced"
    [line, _] = msgspec.json.decode((await books.entries.of(Key("default", "s", "g")))[0].lines)
    ids = [p.id for p in (await books.prices.book()).prices]
    assert line["price"] == ids[0]
    await books.swept()
    assert len(await books.bill()) == 1


async def test_a_price_for_another_time_changes_nothing(books: Books) -> None:
    await books.put(ROWS)
    await books.take(folded())
    later = round(START * 1_000) + 1
    change = await books.put([*ROWS, price("output", "99", valid_from=later)])
    assert change.resettled == 0
    earlier = price("output", "98", valid_from=SINCE - 9, valid_until=SINCE + 1)
    change = await books.put([*ROWS, price("output", "99", valid_from=later), earlier])
    assert change.resettled == 0
    await books.swept()
    assert await books.bill() == [("charge", "0.00033")]


async def test_a_price_changed_later_corrects_existing_charges(books: Books) -> None:
    await books.put(ROWS)
    await books.take(folded())
    await books.put([ROWS[0], price("output", "20")])
    await books.swept()
    assert await books.bill() == [("charge", "0.00033"), ("correction", "0.00031")]
    assert (await books.row()).amount == Decimal("0.00064")


async def test_an_export_corrects_once_and_brought_again_changes_nothing(books: Books) -> None:
    await books.put(ROWS)
    await books.take(folded())
    row = {"generation": "g", "input": 8, "output": 41}
    dry = await books.bring(row, dry_run=True)
    assert (dry.new, dry.matched, dry.corrections, dry.difference) == (1, 1, 1, {"USD": Decimal("0.0001")})
    assert await books.imports.waiting("default") == 0
    done = await books.bring(row, row)
    assert (done.rows, done.new, done.repeated) == (2, 1, 1)
    assert await books.imports.waiting("default") == 1
    await books.swept()
    assert await books.bill() == [("charge", "0.00033"), ("correction", "0.0001")]
    assert ((await books.row()).usage_source, (await books.row()).status) == ("provider_export", "drift")
    assert (await books.bring(row)).new == 0
    await books.swept()
    assert len(await books.bill()) == 2
    assert await books.imports.waiting("default") == 0


async def test_an_export_matches_its_generation_by_upstream_id_also_when_imported_first(books: Books) -> None:
    await books.put(ROWS)
    await books.bring({"id": "up-1", "input": 8, "output": 41}, {"id": "up-2", "input": 1, "output": 1})
    await books.swept()
    assert await books.imports.waiting("default") == 2
    events = history(terminal=None)
    told = UsageReported(generation="g", seq=len(events), at=START, usage=Usage(input=8, output=31), upstream_id="up-1")
    end = Failed(generation="g", seq=len(events) + 1, at=START, code="upstream_cut_off")
    g = fold(None, address(), records([*events, told, end])).generation
    assert g is not None
    await books.take(g)
    await books.swept()
    assert await books.imports.waiting("default") == 1
    row = await books.row()
    assert (row.output, row.status, row.pricing, row.reasons) == (41, "partial", "charged", "cut_off")


async def test_the_last_of_several_rows_for_one_generation_wins(books: Books) -> None:
    await books.put(ROWS)
    await books.take(folded())
    await books.bring(*({"generation": "g", "input": 8, "output": n} for n in (50, 60, 31)))
    await books.swept()
    assert await books.bill() == [("charge", "0.00033")]
    assert (await books.row()).usage_source == "provider_export"


async def test_concurrent_price_changes_and_batches_leave_no_generation_unsettled(books: Books) -> None:
    async def batches() -> None:
        for number in range(15):
            while True:
                try:
                    await books.take(folded(f"g{number}"))
                    break
                except StalePrices:
                    books.position -= 10

    async def changes() -> None:
        for number in range(1, 9):
            await books.put([ROWS[0], price("output", str(number))])

    await asyncio.gather(batches(), changes())
    await books.terms.refresh()
    await books.swept()
    for number in range(15):
        row = await books.row(f"g{number}")
        assert row.amount == Decimal("0.00002") + 31 * Decimal("0.000008")
        assert sum(e.amount for e in await books.entries.of(row.key)) == row.amount


async def test_the_worklist_is_per_partition(books: Books) -> None:
    await books.take(folded())
    await books.put(ROWS)
    await books.bring({"generation": "g", "input": 8, "output": 41})
    worklist = Worklist(books.engine)
    assert (await worklist.resettling(1), await worklist.exports(1)) == ([], [])
    assert len(await worklist.resettling(0)) == len(await worklist.exports(0)) == 1


def upgraded_to(revision: str):  # type: ignore[no-untyped-def]
    def upgrade(connection: Connection) -> None:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", SCRIPTS)
        command.upgrade(config, revision)

    return upgrade


async def test_a_filled_database_of_the_first_schema_is_migrated(empty_database: str) -> None:
    async with open_engine(database_url(empty_database)) as engine:
        async with writing(engine) as connection:
            await connection.run_sync(upgraded_to("0001"))
            old = sa.Table("generations", sa.MetaData(), *(await connection.run_sync(_columns)))
            made = [folded(f"g{n}") for n in range(50)]
            made += [folded("running", terminal=None), folded("failed", terminal=Failed)]
            fields = [column.name for column in old.columns]
            done = [settle(g, NOW, CurrentTerms(Prices(engine)).now)[0] for g in made]
            await connection.execute(sa.insert(old), [{n: getattr(g, n) for n in fields} for g in done])
        await migrate(engine)
        books = Books(engine)
        assert await books.ledger.acquire(0, "first", NOW) == 0
        loaded = await books.ledger.load([g.key for g in made])
        assert {k: (g.output, g.status) for k, g in loaded.items()} == {g.key: (g.output, g.status) for g in done}
        await books.put(ROWS)
        await books.terms.refresh()
        await books.swept()
        bills = [await books.bill(g.generation) for g in made]
        assert bills == [[("charge", "0.00033")]] * 50 + [[], [("charge", "0.0003175")]]


def _columns(connection: Connection) -> list[sa.Column[object]]:
    return [sa.Column(c["name"], c["type"]) for c in sa.inspect(connection).get_columns("generations")]


async def test_the_trigger_names_its_table(books: Books) -> None:
    await books.put(ROWS)
    with pytest.raises(DBAPIError, match="table prices takes new rows only"):
        async with books.engine.begin() as connection:
            await connection.execute(sa.delete(PRICES).where(PRICES.c.id > 0))
    assert GENERATIONS.c.amount is not None
