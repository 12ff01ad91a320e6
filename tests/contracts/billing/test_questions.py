"""Test queries of usage and money over HTTP, on both databases: groups, CSV, pages, the ledger, statements, live."""

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import httpx
import msgspec
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from bench.processes import free_port
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.reports import Reports
from services.billing.adapters.worklist import Money
from services.billing.api import build_api
from services.billing.core.charging import Entry
from services.billing.core.generation import Generation
from services.billing.core.spending import steps
from services.kit.auth.middleware import entering
from services.kit.auth.principal import Principal
from services.kit.clock import SystemClock
from services.kit.http import serving
from tests.support.billing_database import database, engine, postgres_server, postgres_url

__all__ = ["database", "engine", "postgres_server", "postgres_url"]
JANUARY = 1_767_225_600_000  # 2026-01-01
DAY = 86_400_000
NOW = JANUARY + 60 * DAY


class Callers:
    """Authenticates each request by its own headers."""

    is_local = False

    async def authenticate(self, authorization: str | None, ticket: str | None = None) -> Principal:
        tenant, _, sessions = (authorization or "default").partition(" ")
        return Principal(tenant=tenant, operator=True, sessions=tuple(sessions.split()) or ("*",))

    def is_valid(self, principal: Principal) -> bool:
        return True


def generation(number: int, **fields: Any) -> Generation:
    made: dict[str, Any] = {
        "tenant": "default",
        "session": f"s{number % 2}",
        "generation": f"g{number:02}",
        "partition": 0,
        "state": "completed",
        "status": "matched",
        "model": ("fast", "deep")[number % 2],
        "provider": "openai",
        "credential": f"k{number % 3}",
        "metadata": json.dumps({"team": ("red", 'blue "ü"')[number % 2]}) if number % 4 else "",
        "started_at": JANUARY + number * 20 * DAY // 4,
        "counted_input": 7,
        "counted_output": 10 + number,
        "input": 7,
        "output": 11 + number,
        "drift_output": 1,
        "tokens": 18 + number,
        "pricing": "charged",
        "amount": Decimal("0.5") + number,
        "currency": ("USD", "EUR")[number == 5],
        "entries": 1,
    }
    return Generation(**(made | fields))


def entry(g: Generation, number: int = 1, **fields: Any) -> Entry:
    made: dict[str, Any] = {
        "tenant": g.tenant,
        "session": g.session,
        "generation": g.generation,
        "number": number,
        "kind": "charge",
        "amount": g.amount,
        "currency": g.currency,
        "source": "reported",
        "rule": "matched:reported",
        "lines": '[{"token_class":"output","count":3,"price":1,"rate":"10","amount":"0.00003"}]',
        "revision": 0,
        "created_at": g.started_at + 1_000,
    }
    return Entry(**(made | fields))


GENERATIONS = [
    *(generation(n) for n in range(10)),
    generation(10, status="partial", state="failed", pricing="unpriced", amount=Decimal(0), currency="", entries=0),
    generation(11, status="running", state="running", pricing="pending", amount=Decimal(0), currency="", entries=0),
    generation(12, tenant="other", session="secret"),
]


@pytest.fixture
async def client(engine: AsyncEngine) -> AsyncIterator[httpx.AsyncClient]:
    ledger = Ledger(engine, "test")
    await ledger.acquire(0, "log", NOW)
    entries = [entry(g) for g in GENERATIONS if g.entries]
    entries.append(entry(GENERATIONS[3], 2, kind="correction", amount=Decimal("-0.000000000001")))
    money = Money(revision=0, entries=entries, spending=steps({}, GENERATIONS))
    await ledger.commit(0, (0, 60), NOW, GENERATIONS, (), money)

    async def yes() -> bool:
        return True

    app = entering(build_api(Reports(engine), {"database": yes}), Callers())
    port = free_port()
    async with (
        serving(app, "127.0.0.1", port),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
    ):
        yield client


async def ask(client: httpx.AsyncClient, path: str, **query: Any) -> Any:
    answer = await client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def table(answer: httpx.Response) -> list[dict[str, str]]:
    assert answer.headers["content-type"].startswith("text/csv")
    return list(csv.DictReader(io.StringIO(answer.text)))


@pytest.mark.parametrize(
    "group_by", ["key", "month", "status", "provider,model", "model,day", "month,key", "label:team", "session", "hour"]
)
async def test_sums_of_groups_equal_the_sums_of_their_generations(client: httpx.AsyncClient, group_by: str) -> None:
    rows = (await ask(client, "/v1/usage", group_by=group_by))["rows"]
    finer = (await ask(client, "/v1/usage", group_by=f"{group_by},session" if group_by != "session" else "session"))[
        "rows"
    ]
    own = [g for g in GENERATIONS if g.tenant == "default"]
    for found in (rows, finer):
        assert sum(r["totals"]["generations"] for r in found) == len(own)
        assert sum(r["totals"]["output"] for r in found) == sum(g.output or 0 for g in own)
        assert sum(r["totals"]["tokens"] for r in found) == sum(g.tokens for g in own)
        assert sum(r["totals"]["unpriced"] for r in found) == 1
        amounts: dict[str, Decimal] = {}
        for row in found:
            for currency, amount in row["totals"]["amounts"].items():
                amounts[currency] = amounts.get(currency, Decimal(0)) + Decimal(amount)
        assert amounts == {"EUR": Decimal("5.5"), "USD": sum(g.amount for g in own) - Decimal("5.5")}


async def test_months_days_and_labels_are_named(client: httpx.AsyncClient) -> None:
    months = [r["key"]["month"] for r in (await ask(client, "/v1/usage", group_by="month"))["rows"]]
    assert months == ["2026-01", "2026-02"]
    days = [r["key"]["day"] for r in (await ask(client, "/v1/usage", group_by="day", to="2026-01-12"))["rows"]]
    assert days == ["2026-01-01", "2026-01-06", "2026-01-11"]
    labels = {r["key"]["label:team"] for r in (await ask(client, "/v1/usage", group_by="label:team"))["rows"]}
    assert labels == {"", "red", 'blue "ü"'}


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ({"key": "k1"}, 4),
        ({"label": "team=red"}, 3),
        ({"label": 'team=blue "ü"'}, 6),
        ({"label": "team=' OR 1=1"}, 0),
        ({"key": "k1", "from": "2026-01-07"}, 3),
        ({"from": "2026-01-02T03:00:00Z", "model": "fast"}, 5),
    ],
)
async def test_filters_narrow(client: httpx.AsyncClient, query: dict[str, str], count: int) -> None:
    assert (await ask(client, "/v1/usage", **query))["rows"][0]["totals"]["generations"] == count


@pytest.mark.parametrize(
    ("path", "query", "says"),
    [
        ("/v1/usage", {"group_by": "label:a'b"}, "group_by"),
        ("/v1/usage", {"label": "team"}, "label"),
        ("/v1/usage", {"label": "a b=c"}, "label"),
        ("/v1/ledger", {"kind": "gift"}, "kind"),
        ("/v1/ledger", {"from": "2026-02-01", "to": "2026-01-01"}, "to"),
        ("/v1/ledger", {"cursor": "xyz"}, "cursor"),
        ("/v1/reconciliations", {"pricing": "cheap"}, "pricing"),
        ("/v1/reconciliations", {"status": "fine"}, "status"),
        ("/v1/statements/2026-13", {}, "month"),
        ("/v1/statements/january", {}, "month"),
        ("/v1/ledger", {"colour": "red"}, "no such parameter"),
    ],
)
async def test_invalid_query_parameters_are_refused(
    client: httpx.AsyncClient, path: str, query: dict[str, str], says: str
) -> None:
    answer = await client.get(path, params=query)
    assert answer.status_code == 400
    assert says in answer.json()["detail"]


async def test_usage_as_csv_has_a_line_for_each_currency(client: httpx.AsyncClient) -> None:
    rows = table(await client.get("/v1/usage", params={"group_by": "model"}, headers={"accept": "text/csv"}))
    assert [(r["model"], r["generations"], r["currency"]) for r in rows] == [
        ("deep", "6", "EUR"),
        ("deep", "", "USD"),
        ("fast", "6", "USD"),
    ]


async def test_if_none_match_with_the_current_etag_is_304(client: httpx.AsyncClient) -> None:
    for path in (
        "/v1/usage",
        "/v1/ledger",
        "/v1/reconciliations",
        "/v1/usage/generations/g03",
        "/v1/statements/2026-01",
    ):
        first = await client.get(path)
        again = await client.get(path, headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        other = await client.get(path, headers={"if-none-match": first.headers["etag"], "accept": "text/csv"})
        assert other.status_code == 200


async def test_the_ledger_is_read_in_pages_of_any_size(client: httpx.AsyncClient) -> None:
    whole = (await ask(client, "/v1/ledger"))["entries"]
    assert len(whole) == 11
    assert [e["created_at"] for e in whole] == sorted(e["created_at"] for e in whole)
    assert {e["generation"] for e in whole} == {f"g{n:02}" for n in range(10)}
    for limit in (1, 3, 11):
        paged, cursor = [], None
        while True:
            page = await ask(client, "/v1/ledger", limit=limit, **({"cursor": cursor} if cursor else {}))
            paged += page["entries"]
            cursor = page["next"]
            if cursor is None:
                break
        assert paged == whole
    corrections = (await ask(client, "/v1/ledger", kind="correction"))["entries"]
    assert [(e["generation"], e["number"], e["amount"]) for e in corrections] == [("g03", 2, "-0.000000000001")]
    rows = table(await client.get("/v1/ledger?limit=2", headers={"accept": "text/csv"}))
    assert [r["generation"] for r in rows] == ["g00", "g01"]


async def test_the_next_page_of_csv_is_in_the_link_header(client: httpx.AsyncClient) -> None:
    seen: list[str] = []
    url = "/v1/ledger?limit=4"
    while url:
        answer = await client.get(url, headers={"accept": "text/csv"})
        seen += [r["generation"] for r in table(answer)]
        url = answer.links.get("next", {}).get("url", "")
    assert len(seen) == 11


async def test_a_generation_is_shown_with_every_entry(client: httpx.AsyncClient) -> None:
    shown = await ask(client, "/v1/usage/generations/g03")
    assert [(e["number"], e["kind"], e["amount"]) for e in shown["entries"]] == [
        (1, "charge", "3.5"),
        (2, "correction", "-0.000000000001"),
    ]
    assert shown["entries"][0]["lines"][0] | {"price": 0} == {
        "class": "output",
        "count": 3,
        "price": 0,
        "rate": "10",
        "amount": "0.00003",
        "call": 0,
    }
    assert (shown["status"], shown["events"]) == ("matched", 0)


async def test_reconciliations_are_found_by_status_and_price(client: httpx.AsyncClient) -> None:
    partial = (await ask(client, "/v1/reconciliations", status="partial"))["generations"]
    assert [g["generation"] for g in partial] == ["g10"]
    unpriced = (await ask(client, "/v1/reconciliations", pricing="unpriced"))["generations"]
    assert [g["generation"] for g in unpriced] == ["g10"]
    rows = table(await client.get("/v1/reconciliations?key=k0&limit=2", headers={"accept": "text/csv"}))
    assert [(r["generation"], r["amount"], r["drift_output"]) for r in rows] == [
        ("g00", "0.5", "1"),
        ("g03", "3.5", "1"),
    ]


async def test_a_statement_is_json_csv_and_a_page(client: httpx.AsyncClient) -> None:
    made = await ask(client, "/v1/statements/2026-01")
    assert made["amounts"] == {"EUR": "5.5", "USD": "19"}
    assert (made["final"], made["open"], made["unpriced"]) == (True, 0, 0)
    rows = table(await client.get("/v1/statements/2026-01", headers={"accept": "text/csv"}))
    assert sum(Decimal(r["amount"]) for r in rows if r["currency"] == "USD") == 19
    page = await client.get("/v1/statements/2026-02", headers={"accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "Generations that have not settled yet: 1." in page.text
    assert "without a price" in page.text
    assert (await ask(client, "/v1/statements/2025-01"))["lines"] == []


async def test_money_of_another_tenant_is_not_visible(client: httpx.AsyncClient) -> None:
    other = {"authorization": "other"}
    assert [e["generation"] for e in (await client.get("/v1/ledger", headers=other)).json()["entries"]] == ["g12"]
    assert (await client.get("/v1/usage/generations/g03", headers=other)).status_code == 404
    narrow = {"authorization": "default s0"}
    assert (await client.get("/v1/ledger", headers=narrow)).status_code == 403
    assert (await client.get("/v1/reconciliations?session=s1", headers=narrow)).status_code == 404
    assert len((await client.get("/v1/ledger?session=s0", headers=narrow)).json()["entries"]) == 5
    assert (await client.get("/v1/statements/2026-01", headers=narrow)).status_code == 403
    assert (await client.get("/v1/usage/live", headers=narrow)).status_code == 403


async def test_live_totals_follow_ledger_commits(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    today = int(SystemClock().wall() * 1_000)
    ledger = Ledger(engine, "test")

    async def lines() -> AsyncIterator[dict[str, Any]]:
        async with client.stream("GET", "/v1/usage/live") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))

    async with asyncio.timeout(20):
        told = lines()
        first = await anext(told)
        assert (first["totals"]["generations"], first["running"]["counted_output"]) == (0, 0)
        g = generation(20, status="running", state="running", started_at=today, entries=0, amount=Decimal(0))
        await ledger.commit(0, (60, 61), NOW, [g])
        assert (await anext(told))["running"]["counted_output"] == 30
        more = msgspec.structs.replace(g, counted_output=44)
        await ledger.commit(0, (61, 62), NOW, [], [more])
        assert (await anext(told))["running"]["counted_output"] == 44
        await told.aclose()
