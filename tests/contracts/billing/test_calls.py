"""Abandoned calls in the ledger, and exports that name them, on SQLite and PostgreSQL."""

import msgspec
import sqlalchemy as sa

from schemas.usage import Usage
from services.billing.adapters.database import migrate, open_engine, reading, writing
from services.billing.adapters.reports import Reports
from services.billing.adapters.tables import CALLS, SPENDING
from services.billing.adapters.worklist import Money
from services.billing.core.calls import abandoned_calls
from services.billing.core.fold import fold
from services.billing.core.generation import Generation, Key
from services.billing.core.question import Filters
from services.billing.core.settlement import settle
from services.billing.core.spending import released, steps
from services.billing.database_url import database_url
from tests.contracts.billing.test_money import NOW, ROWS, Books, books, folded, upgraded_to
from tests.support.billing_database import database, empty_database, engine, postgres_server, postgres_url
from tests.support.billing_histories import address, records, restarted_history

__all__ = ["books", "database", "empty_database", "engine", "postgres_server", "postgres_url"]


def restarted(name: str = "g", **made: object) -> Generation:
    made.setdefault("reported", Usage(input=8, output=20))
    g = fold(None, address(name), records(restarted_history(name, **made), place=address(name))).generation  # type: ignore[arg-type]
    assert g is not None
    return g


async def test_abandoned_calls_are_stored_with_their_generation_and_charged(books: Books) -> None:
    await books.put(ROWS)
    made = restarted()
    await books.take(made)
    row = await books.row()
    assert (row.calls, row.tokens) == (made.calls, 2 * 27 + 28)
    assert await books.bill() == [("charge", "0.000655")]
    [entry] = await books.entries.of(Key("default", "s", "g"))
    assert entry.rule == "matched:reported,abandoned:provider"
    totals = await Reports(books.engine).totals(Filters(tenant="default", session="s"))
    assert (totals.tokens, totals.counted_input, totals.counted_output) == (82, 21, 60)


async def test_an_export_matches_an_abandoned_call_by_upstream_id(books: Books) -> None:
    await books.put(ROWS)
    await books.take(restarted())
    row = {"id": "up-2", "input": 9, "output": 25}
    dry = await books.bring(row, dry_run=True)
    assert (dry.matched, dry.corrections, {c: f"{a:f}" for c, a in dry.difference.items()}) == (
        1,
        1,
        {"USD": "0.000055000000"},
    )
    await books.bring(row)
    await books.swept()
    after = await books.row()
    assert [(c.number, c.source, c.usage and c.usage.output) for c in abandoned_calls(after)] == [
        (1, "", None),
        (2, "provider_export", 25),
    ]
    assert (after.usage_source, after.status) == ("stream", "matched")
    assert await books.bill() == [("charge", "0.000655"), ("correction", "0.000055")]
    assert await books.imports.waiting("default") == 0
    await books.swept()
    assert len(await books.bill()) == 2


async def test_export_rows_for_all_calls_may_be_imported_before_the_generation(books: Books) -> None:
    await books.put(ROWS)
    rows = [{"id": f"up-{n}", "input": 10 * n, "output": n} for n in (1, 2)]
    await books.bring(*rows, {"generation": "g", "input": 5, "output": 6})
    await books.take(restarted(is_told=True))
    await books.swept()
    after = await books.row()
    assert (after.tokens, after.input, after.output) == (11 + 22 + 11, 35, 9)


async def test_upstream_ids_of_calls_are_stored_once(books: Books) -> None:
    await books.put(ROWS)
    await books.take(restarted())
    await books.take(await books.row())
    async with reading(books.engine) as connection:
        found = (await connection.execute(sa.select(CALLS.c.number, CALLS.c.upstream_id).order_by("number"))).all()
    assert [tuple(one) for one in found] == [(1, "up-1"), (2, "up-2")]


async def test_generations_from_an_older_schema_have_no_abandoned_calls_and_keep_their_charges(
    empty_database: str,
) -> None:
    async with open_engine(database_url(empty_database)) as engine:
        async with writing(engine) as connection:
            await connection.run_sync(upgraded_to("0003"))
            fields = [n for n in Generation.__struct_fields__ if n not in ("calls", "amount", "cache_write_1h")]
            columns = await connection.run_sync(lambda c: sa.inspect(c).get_columns("generations"))
            old = sa.Table("generations", sa.MetaData(), *(sa.Column(c["name"], c["type"]) for c in columns))
            g = folded()
            await connection.execute(sa.insert(old), [{n: getattr(g, n) for n in fields}])
        await migrate(engine)
        books = Books(engine)
        assert await books.ledger.acquire(0, "first", NOW) == 0
        assert await books.row() == msgspec.structs.replace(g, cache_write_1h=None)


async def test_budgets_include_the_tokens_of_all_calls(books: Books) -> None:
    await books.put(ROWS)
    terms = await books.terms.refresh()
    g, entries = settle(restarted(), NOW, terms)
    money = Money(revision=terms.book.revision, entries=entries, spending=steps({}, [g]), released=released({}, [g]))
    await books.ledger.commit(0, (0, 1), NOW, [g], (), money)
    async with reading(books.engine) as connection:
        row = (await connection.execute(sa.select(SPENDING))).one()
    assert (row.tokens, row.counted_output, row.output) == (82, 60, 20)
