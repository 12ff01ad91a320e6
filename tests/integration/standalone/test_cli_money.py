"""The commands about usage and money, against billing's real API."""

import asyncio
import csv
import io
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from bench.processes import free_port
from services.billing.adapters.database import migrate, open_engine
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.reports import Reports
from services.billing.adapters.worklist import Money
from services.billing.api import build_api
from services.billing.core.spending import steps
from services.billing.database_url import database_url
from services.kit.auth.middleware import entering
from services.kit.http import serving
from tests.contracts.billing.test_questions import GENERATIONS, NOW, Callers, entry


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Billing:
    def __init__(self, url: str) -> None:
        self.url = url

    async def run(self, *arguments: str, code: int = 0) -> Done:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.standalone.cli",
            *arguments,
            "--billing-url",
            self.url,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 30)
        done = Done(process.returncode or 0, out.decode(), err.decode())
        assert done.code == code, done
        return done


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[Billing]:
    async with open_engine(database_url(f"sqlite:///{folder}/billing.db")) as engine:
        await migrate(engine)
        ledger = Ledger(engine, "test")
        await ledger.acquire(0, "log", NOW)
        entries = [entry(g) for g in GENERATIONS if g.entries]
        await ledger.commit(
            0, (0, 60), NOW, GENERATIONS, (), Money(revision=0, entries=entries, spending=steps({}, GENERATIONS))
        )
        port = free_port()
        async with serving(entering(build_api(Reports(engine), {}), Callers()), "127.0.0.1", port):
            yield Billing(f"http://127.0.0.1:{port}")


@pytest.fixture
async def billing(tmp_path: Path) -> AsyncIterator[Billing]:
    async with served(tmp_path) as made:
        yield made


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


async def test_usage_is_a_table_json_or_csv(billing: Billing) -> None:
    shown = (await billing.run("usage", "--by", "month,key")).out
    assert shown.splitlines()[0].split()[:3] == ["month", "key", "generations"]
    assert "2026-02" in shown
    assert "5.5 EUR" in (await billing.run("usage", "--by", "model")).out
    rows = json.loads((await billing.run("usage", "--by", "label:team", "--json")).out)["rows"]
    assert {row["key"]["label:team"] for row in rows} == {"", "red", 'blue "ü"'}
    assert len(table((await billing.run("usage", "--by", "session", "--csv")).out)) == 3
    narrowed = table((await billing.run("usage", "--by", "model", "--label", "team=red", "--csv")).out)
    assert [(r["model"], r["generations"]) for r in narrowed] == [("fast", "3")]
    assert len(table((await billing.run("usage", "s0", "--csv")).out)) == 6


async def test_ledger_and_reconciliations_are_listed(billing: Billing) -> None:
    assert len((await billing.run("ledger", "--limit", "3")).out.splitlines()) == 4
    assert len(json.loads((await billing.run("ledger", "--json")).out)["entries"]) == 10
    assert len(table((await billing.run("ledger", "--csv", "--limit", "4")).out)) == 4
    shown = (await billing.run("reconcile", "--status", "partial")).out
    assert "g10" in shown
    assert "unpriced" in shown
    assert "no matching rows" in (await billing.run("ledger", "--kind", "reversal")).err


async def test_a_statement_in_every_form(billing: Billing) -> None:
    assert "total: 5.5 EUR, 19 USD" in (await billing.run("statement", "2026-01")).err
    assert json.loads((await billing.run("statement", "2026-01", "--json")).out)["final"] is True
    assert (await billing.run("statement", "2026-01", "--html")).out.startswith("<!doctype html>")
    assert {r["model"] for r in table((await billing.run("statement", "2026-01", "--csv")).out)} == {"fast", "deep"}
    assert "2026-1" in (await billing.run("statement", "2026-1", code=1)).err


async def test_budgets_are_set_shown_and_removed(billing: Billing) -> None:
    made = json.loads((await billing.run("budget", "set", "monthly", "--hard", "100", "--soft", "80", "--json")).out)
    shown = (await billing.run("budget", "set", "monthly", "--hard", "100", "--soft", "80")).out
    assert shown.splitlines()[0].split() == [
        "name",
        "period",
        "unit",
        "key",
        "soft",
        "hard",
        "spent",
        "reserved",
        "left",
    ]
    assert (made["unit"], made["left"]) == ("USD", "100")
    assert "monthly" in (await billing.run("budget")).out
    assert "above the hard limit" in (await billing.run("budget", "set", "b", "--hard", "1", "--soft", "2", code=1)).err
    await billing.run("budget", "remove", "monthly")
    assert json.loads((await billing.run("budget", "--json")).out) == {"budgets": []}
    assert "no budget" in (await billing.run("budget", "remove", "monthly", code=1)).err


async def test_prices_round_trip_through_put_and_show(billing: Billing, tmp_path: Path) -> None:
    file = tmp_path / "prices.csv"
    file.write_text(
        "provider,model,class,currency,amount,from,until\r\nopenai,fast,input,USD,2.50,2026-01-01,\r\n"
        "openai,fast,output,USD,10,2026-01-01,\r\n"
    )
    assert "dry" not in (await billing.run("prices")).out
    await billing.run("prices", "put", str(file), "--dry-run")
    assert "empty" in (await billing.run("prices")).err
    await billing.run("prices", "put", str(file))
    shown = (await billing.run("prices", "--csv")).out
    assert [(r["class"], r["amount"]) for r in table(shown)] == [("input", "2.5"), ("output", "10")]
    file.write_text("provider,model\r\nopenai,fast\r\n")
    assert "fault" in (await billing.run("prices", "put", str(file), code=1)).err
    other = tmp_path / "prices.txt"
    other.write_text("")
    assert ".csv" in (await billing.run("prices", "put", str(other), code=2)).err


async def test_a_provider_export_is_imported_after_a_dry_run(billing: Billing, tmp_path: Path) -> None:
    file = tmp_path / "export.csv"
    file.write_text("generation,input_tokens,output_tokens\r\ng01,7,99\r\n")
    tried = json.loads((await billing.run("reconcile", "import", str(file), "--dry-run")).out)
    assert (tried["rows"], tried["new"], tried["dry_run"]) == (1, 1, True)
    assert json.loads((await billing.run("reconcile", "import", str(file))).out)["new"] == 1
    assert json.loads((await billing.run("reconcile", "import", str(file))).out)["repeated"] == 1


async def test_two_forms_at_once_are_wrong_usage(billing: Billing) -> None:
    for command in (["usage"], ["ledger"], ["reconcile"], ["statement", "2026-01"]):
        assert "exclude each other" in (await billing.run(*command, "--json", "--csv", code=2)).err
