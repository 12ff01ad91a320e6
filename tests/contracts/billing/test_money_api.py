"""Prices and providers' exports over real HTTP, on SQLite and PostgreSQL."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from bench.processes import free_port
from services.billing.adapters.reports import Reports
from services.billing.api import build_api
from services.billing.core.price_file import parse_toml
from services.billing.price_loading import load_price_file, read_price_file
from services.kit.auth.middleware import entering
from services.kit.auth.principal import SCOPES, Principal
from services.kit.clock import SystemClock
from services.kit.http import serving
from services.kit.settings import SettingsError
from tests.contracts.billing.test_money import Books, books, folded
from tests.support.billing_database import database, engine, postgres_server, postgres_url
from tests.support.billing_prices import BOOK_TOML

__all__ = ["books", "database", "engine", "postgres_server", "postgres_url"]
TOML = {"content-type": "application/toml"}
CSV = {"content-type": "text/csv; charset=utf-8"}
JSON = {"content-type": "application/json"}
DOCUMENT = Path(__file__).parents[3] / "docs" / "billing.md"


class Caller:
    """Authenticates every request as one principal, which a test may change."""

    is_local = False

    def __init__(self) -> None:
        self.principal = Principal(tenant="default", operator=True)

    async def authenticate(self, authorization: str | None, ticket: str | None = None) -> Principal:
        return self.principal

    def is_valid(self, principal: Principal) -> bool:
        return True


@pytest.fixture
def caller() -> Caller:
    return Caller()


@pytest.fixture
async def client(engine: AsyncEngine, caller: Caller) -> AsyncIterator[httpx.AsyncClient]:
    app = entering(build_api(Reports(engine), {}), caller)
    port = free_port()
    async with serving(app, "127.0.0.1", port), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        yield client


async def test_a_price_book_round_trips_through_the_api(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/prices")).json() == {"revision": 0, "prices": []}
    dry = await client.put("/v1/prices?dry_run=true", content=BOOK_TOML, headers=TOML)
    assert (dry.status_code, dry.json()["added"], dry.json()["dry_run"]) == (200, 3, True)
    assert (await client.get("/v1/prices")).json()["prices"] == []
    assert (await client.put("/v1/prices", content=BOOK_TOML, headers=TOML)).json()["revision"] == 1
    shown = (await client.get("/v1/prices")).json()
    assert [(p["class"], p["amount"], p["from"]) for p in shown["prices"]] == [
        ("input", "2.5", "2020-09-13"),
        ("cached_input", "1.25", "2020-09-13"),
        ("output", "10", "2020-09-13"),
    ]
    csv = await client.get("/v1/prices", headers={"accept": "text/csv"})
    assert csv.headers["content-type"].startswith("text/csv")
    again = (await client.put("/v1/prices", content=csv.content, headers=CSV)).json()
    assert (again["revision"], again["added"], again["withdrawn"], again["kept"]) == (1, 0, 0, 3)


async def test_every_fault_of_a_price_book_is_reported_and_no_row_changes(client: httpx.AsyncClient) -> None:
    answer = await client.put("/v1/prices", content=BOOK_TOML.replace('"2.50"', "-1").replace("10", "x"), headers=TOML)
    assert answer.status_code == 422
    text = "provider,model,class,currency,amount,from\na,b,c,USD,1,2026-01-01\na,b,input,USD,x,2026-01-01\n"
    answer = await client.put("/v1/prices", content=text, headers=CSV)
    assert [e["line"] for e in answer.json()["errors"]] == [2, 3]
    assert (await client.put("/v1/prices", content=b"x", headers={"content-type": "text/plain"})).status_code == 415
    assert (await client.get("/v1/prices")).json()["revision"] == 0


async def test_new_prices_charge_unpriced_generations_and_an_export_corrects_the_charge(
    client: httpx.AsyncClient, books: Books
) -> None:
    await books.take(folded())
    charge = (await client.get("/v1/usage/generations/g")).json()["charge"]
    assert charge == {"status": "unpriced", "amount": "0", "currency": None, "entries": 0, "tokens": 39}
    assert (await client.put("/v1/prices", content=BOOK_TOML, headers=TOML)).json()["resettled"] == 1
    await books.swept()
    charge = (await client.get("/v1/usage/generations/g")).json()["charge"]
    assert charge == {"status": "charged", "amount": "0.00033", "currency": "USD", "entries": 1, "tokens": 39}
    text = "generation,input,output\ng,8,41\nunknown,1,1\n"
    told = {"rows": 2, "new": 2, "repeated": 0, "matched": 1, "corrections": 1, "difference": {"USD": "0.0001"}}
    dry = await client.post("/v1/provider-usage?dry_run=true", content=text, headers=CSV)
    assert (dry.status_code, dry.json()) == (200, {**told, "dry_run": True})
    done = await client.post("/v1/provider-usage", content=text, headers=CSV)
    assert done.json() == {**told, "dry_run": False}
    assert (await client.post("/v1/provider-usage", content=text, headers=CSV)).json()["new"] == 0
    await books.terms.refresh()
    await books.swept()
    body = (await client.get("/v1/usage/generations/g")).json()
    assert (body["charge"]["amount"], body["charge"]["entries"]) == ("0.00043", 2)
    assert (body["usage_source"], body["reported"]["output"], body["status"]) == ("provider_export", 41, "drift")


async def test_every_fault_of_an_export_is_reported_and_no_row_is_imported(
    client: httpx.AsyncClient, books: Books
) -> None:
    rows = (
        b'[{"generation": "g", "input": 1, "output": 1}, {"input": 1, "output": 1}, {"generation": "g", "output": -1}]'
    )
    answer = await client.post("/v1/provider-usage", content=rows, headers=JSON)
    assert answer.status_code == 422
    assert [e["row"] for e in answer.json()["errors"]] == [2, 3]
    assert await books.imports.waiting("default") == 0


async def test_an_export_cannot_change_generations_of_another_tenant(
    client: httpx.AsyncClient, caller: Caller, books: Books
) -> None:
    await books.put([])
    await books.take(folded())
    caller.principal = Principal(tenant="other", operator=True)
    rows = b'[{"generation": "g", "input": 1, "output": 1}]'
    assert (await client.post("/v1/provider-usage", content=rows, headers=JSON)).json()["matched"] == 0
    await books.swept()
    assert (await books.row()).usage_source != "provider_export"


async def test_changing_money_needs_the_scope_admin(client: httpx.AsyncClient, caller: Caller) -> None:
    caller.principal = Principal(tenant="default", scopes=SCOPES - {"admin"})
    assert (await client.put("/v1/prices", content=BOOK_TOML, headers=TOML)).status_code == 403
    assert (await client.post("/v1/provider-usage", content=b"[]", headers=JSON)).status_code == 403


async def test_credentials_limited_to_sessions_see_only_their_own_budgets_and_change_none(
    client: httpx.AsyncClient, caller: Caller
) -> None:
    for name, fields in (("all", {}), ("own", {"key": "tr_own"}), ("other", {"key": "tr_other"})):
        wish = {"period": "month", "unit": "USD", "hard": "100", **fields}
        assert (await client.put(f"/v1/budgets/{name}", json=wish)).status_code == 201
    seen = [(("*",), "tr_own", ["all", "other", "own"]), (("a-*",), "tr_own", ["own"]), (("a",), "", [])]
    for sessions, key, names in seen:
        caller.principal = Principal(tenant="default", key=key, sessions=sessions)
        listed = await client.get("/v1/budgets")
        assert sorted(b["name"] for b in listed.json()["budgets"]) == names
        for name in ("all", "own", "other"):
            shown = await client.get(f"/v1/budgets/{name}")
            assert shown.status_code == (200 if name in names else 404)
    put = await client.put("/v1/budgets/all", json={"period": "month", "unit": "USD", "hard": "1"})
    assert put.status_code == 403
    assert (await client.delete("/v1/budgets/all")).status_code == 403
    assert (await client.post("/v1/provider-usage", content=b"[]", headers=JSON)).status_code == 403
    caller.principal = Principal(tenant="default", operator=True)
    assert (await client.get("/v1/budgets/all")).json()["hard"] == "100"


async def test_a_price_file_is_loaded_when_its_content_is_new_and_a_later_book_stays(
    books: Books, tmp_path: Path
) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(BOOK_TOML)
    first = await load_price_file(books.prices, path, SystemClock())
    assert first is not None
    assert first.added == 3
    await books.put([])
    assert await load_price_file(books.prices, path, SystemClock()) is None
    assert (await books.prices.book()).prices == ()
    path.write_text(BOOK_TOML.replace("2.50", "3"))
    assert await load_price_file(books.prices, path, SystemClock()) is not None
    assert len((await books.prices.book()).prices) == 3


def test_a_faulty_price_file_is_a_settings_error(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    path.write_text("provider,model,class,currency,amount,from\na,b,input,USD,x,2026-01-01\n")
    with pytest.raises(SettingsError, match=r"prices\.csv line 2: amount"):
        read_price_file(path)
    with pytest.raises(SettingsError, match="cannot read"):
        read_price_file(tmp_path / "none.toml")
    with pytest.raises(SettingsError, match=r"not a \.toml"):
        read_price_file(tmp_path / "prices.yaml")


def test_the_price_file_in_the_document_is_valid() -> None:
    [text] = re.findall(r"^```\n(currency = .*?)^```", DOCUMENT.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(parse_toml(text)) == 6
