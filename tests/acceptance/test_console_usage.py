"""The usage page of the console in a real browser, against real delivery and billing with some history."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import httpx
import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from sqlalchemy.ext.asyncio import AsyncEngine

from bench.processes import free_port
from services.billing.adapters.database import migrate, open_engine
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.reports import Reports
from services.billing.adapters.worklist import Money
from services.billing.api import build_api
from services.billing.core.generation import Generation
from services.billing.core.spending import steps
from services.billing.database_url import database_url
from services.kit.auth.middleware import entering
from services.kit.auth.principal import Principal
from services.kit.http import serving
from services.kit.jetstream.broker import Broker
from services.kit.problem import Problem
from tests.contracts.billing.test_questions import entry, generation
from tests.support.credentials import guarded
from tests.support.delivery_server import Stage, delivering

if TYPE_CHECKING:
    from tests.support.browser import Browser

pytest_plugins = ("tests.support.browser",)
pytestmark = pytest.mark.browser

DAY: Final = 86_400_000
NOW: Final = round(time.time() * 1_000)
KEY: Final = "tr_abcdef_" + "k" * 43
MODELS: Final = (
    "gpt-4o",
    "gpt-4o-mini",
    "claude-sonnet-4",
    "command-a",
    "deepseek-r1",
    "mistral-large-with-a-long-name-2512",
)
PROVIDERS: Final = ("openai", "openai", "anthropic", "cohere", "openrouter", "openrouter")


class Callers:
    """Authenticate every request as tenant ``default``; require `KEY` where keys are enabled."""

    is_local = False

    def __init__(self, *, keyed: bool) -> None:
        self._keyed = keyed

    async def authenticate(self, authorization: str | None, ticket: str | None = None) -> Principal:
        if self._keyed and authorization != f"Bearer {KEY}":
            raise Problem(401, "the API key is not valid")
        return Principal(tenant="default", operator=True)

    def is_valid(self, principal: Principal) -> bool:
        return True


class Site(NamedTuple):
    """The page's URL, billing's URL, and a writer to billing's database."""

    url: str
    billing: str
    ledger: Ledger
    stage: Stage

    @property
    def page(self) -> str:
        return f"{self.url}/console/usage"


def history(count: int = 400) -> list[Generation]:
    """Return a month of generations, all alike in every run but for their days."""
    drawn = random.Random(5)
    made = []
    for n in range(count):
        model = drawn.choices(range(6), (8, 6, 5, 3, 2, 1))[0]
        counted = drawn.randrange(50, 900)
        drift = 0 if n % 9 else drawn.choice((-40, 25, 60))
        fields: dict[str, Any] = {"status": "drift" if drift else "matched"}
        if n % 23 == 0:
            fields = {"status": "partial", "state": "failed"}
        if n % 61 == 0:
            fields = {"pricing": "unpriced", "amount": Decimal(0), "currency": "", "entries": 0}
        made.append(
            generation(
                n,
                **{
                    "generation": f"g{n:04}",
                    "model": MODELS[model],
                    "provider": PROVIDERS[model],
                    "credential": f"key-{n % 4}",
                    "metadata": "",
                    "started_at": NOW - int(drawn.random() ** 1.3 * 27 * DAY),
                    "counted_output": counted,
                    "output": counted + drift,
                    "drift_output": drift,
                    "tokens": counted + 400,
                    "amount": Decimal(counted * (8 - model)) / 10_000,
                    "currency": "EUR" if model == 5 else "USD",
                }
                | fields,
            )
        )
    return made


def running(number: int, counted: int) -> Generation:
    """Return a generation that streams at the moment."""
    open_fields: dict[str, Any] = {"status": "running", "state": "running", "pricing": "pending", "entries": 0}
    return generation(
        number,
        generation=f"live{number}",
        started_at=round(time.time() * 1_000),
        counted_output=counted,
        output=None,
        tokens=0,
        amount=Decimal(0),
        currency="",
        drift_output=None,
        **open_fields,
    )


async def write(engine: AsyncEngine, generations: list[Generation]) -> Ledger:
    await migrate(engine)
    ledger = Ledger(engine, "test")
    await ledger.acquire(0, "log", NOW)
    entries = [entry(g) for g in generations if g.entries]
    money = Money(revision=0, entries=entries, spending=steps({}, generations))
    await ledger.commit(0, (0, 60), NOW, generations, (), money)
    return ledger


@asynccontextmanager
async def site(
    nats_url: str, folder: Path, generations: list[Generation], *, keyed: bool = False, serve: bool = True
) -> AsyncIterator[Site]:
    """Run delivery and billing's API for each other while the block runs; billing's not where ``serve`` is false."""
    billing = f"http://127.0.0.1:{(port := free_port())}"
    settings: dict[str, Any] = {"console": True, "billing_url": billing}
    async with (
        open_engine(database_url(f"sqlite:///{folder}/billing.db")) as engine,
        guarded(nats_url, folder, **settings) if keyed else delivering(nats_url, **settings) as stage,
    ):
        ledger = await write(engine, generations)
        if not serve:
            yield Site(stage.url, billing, ledger, stage)
            return
        async with asked(engine, port, stage.url, keyed=keyed):
            yield Site(stage.url, billing, ledger, stage)


@asynccontextmanager
async def asked(engine: AsyncEngine, port: int, origin: str, *, keyed: bool) -> AsyncIterator[None]:
    app = entering(build_api(Reports(engine), {}, [origin]), Callers(keyed=keyed), [origin])
    async with serving(app, "127.0.0.1", port, grace=lambda: 1):
        yield


async def budget(made: Site, name: str, **wish: str) -> None:
    answer = await made.stage.http.put(f"{made.billing}/v1/budgets/{name}", json={"period": "month", **wish})
    assert answer.status_code == 201, answer.text


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.browser.DEADLINE", 30.0)


@pytest.fixture
async def month(broker: Broker, nats_url: str, tmp_path: Path) -> AsyncIterator[Site]:
    async with site(nats_url, tmp_path, history()) as made:
        await budget(made, "monthly", unit="USD", soft="80", hard="100")
        await budget(made, "tokens", unit="tokens", hard="5000", key="key-1")
        await budget(made, "watched", unit="USD", soft="5")
        yield made


async def in_browser(act: Callable[[], Any]) -> Any:
    """Run a blocking browser function in a thread, beside the services of this event loop, and return its result."""
    return await asyncio.to_thread(act)


def tile(browser: "Browser", place: str, name: str) -> str:
    """Return the value of a tile, '' while there is none."""
    script = """return [...document.querySelectorAll(arguments[0] + ' .tile')]
        .find((tile) => tile.querySelector('dt').textContent === arguments[1])?.querySelector('dd').textContent ?? ''"""
    return str(browser.driver.execute_script(script, place, name))


def cells(browser: "Browser", css: str) -> list[list[str]]:
    script = """return [...document.querySelectorAll(arguments[0] + ' tbody tr')]
        .map((row) => [...row.cells].map((cell) => cell.textContent))"""
    found: list[list[str]] = browser.driver.execute_script(script, css)
    return found


def overflow(browser: "Browser") -> list[str]:
    """Return elements wider than the window, except those with their own scroll bar."""
    script = """const wide = (e) => e.getBoundingClientRect().right > innerWidth + 1
        return [...document.querySelectorAll('main *')]
        .filter((e) => !e.closest('.wide-content, .hidden, [hidden]') && wide(e))
        .map((e) => e.outerHTML.slice(0, 120))"""
    found: list[str] = browser.driver.execute_script(script)
    return found


async def test_totals_charts_and_tables_match_the_billing_api(month: Site, browser: "Browser") -> None:
    answer = (await month.stage.http.get(f"{month.billing}/v1/usage")).json()
    totals = answer["rows"][0]["totals"]

    def look() -> None:
        browser.open(month.page)
        browser.until(lambda: browser.visible("#charts svg"))
        assert tile(browser, "#tiles", "Generations") == f"{totals['generations']:,}" == "400"
        assert tile(browser, "#tiles", "Tokens") == f"{totals['tokens']:,}"
        assert tile(browser, "#tiles", "Unpriced") == str(totals["unpriced"]) != "0"
        assert int(tile(browser, "#tiles", "Partial")) > 10
        titles = [e.text for e in browser.driver.find_elements("css selector", ".chart h3")]
        assert titles == ["Spend in EUR by model", "Spend in USD by model", "Tokens by model"]
        spent = sum(Decimal(row[2]) for row in cells(browser, '[aria-label="Spend in USD by model"] .alternative'))
        assert spent == Decimal(totals["amounts"]["USD"])
        models = {row[0]: row for row in cells(browser, "#agreement-table")}
        assert sum(int(row[1]) for row in models.values()) == 400
        assert "anthropic/claude-sonnet-4" in models
        assert browser.complaints() == []

    await in_browser(look)


async def test_the_page_itself_does_not_scroll_and_is_not_blank_below(month: Site, browser: "Browser") -> None:
    def look() -> None:
        for width in (1280, 390):
            browser.size(width, 844)
            browser.open(month.page)
            browser.until(lambda: browser.visible("#charts svg"))
            page, inner = browser.driver.execute_script(
                "const u = document.querySelector('#usage');"
                "return [[document.documentElement.scrollHeight, innerHeight], [u.scrollHeight, u.clientHeight]]"
            )
            assert page[0] <= page[1], f"the page scrolls at {width} px beside its own scroller: {page}"
            assert inner[0] > inner[1]

    await in_browser(look)


async def test_svg_images_have_names_descriptions_and_tables(month: Site, browser: "Browser") -> None:
    def look() -> None:
        browser.open(month.page)
        browser.until(lambda: browser.visible("#charts svg"))
        pictures = browser.driver.find_elements("css selector", "svg[role=img]")
        assert len(pictures) == 6  # three charts, three budgets
        for picture in pictures:
            for place in str(picture.get_attribute("aria-labelledby")).split():
                assert browser.text(f"#{place}")
        assert len(browser.driver.find_elements("css selector", ".chart details table")) == 3
        parts = browser.driver.find_elements("css selector", ".column rect > title")
        assert all(part.get_attribute("textContent") for part in parts[:20])

    await in_browser(look)


async def test_period_and_grouping_are_stored_in_the_url(month: Site, browser: "Browser") -> None:
    def look() -> None:
        browser.open(month.page)
        browser.until(lambda: browser.visible("#charts svg"))
        Select(browser.one("#by")).select_by_value("key")
        browser.until_text(".chart h3", "Tokens by key")
        assert {e.text for e in browser.driver.find_elements("css selector", ".chart:last-child .legend span")} == {
            f"key-{n}" for n in range(4)
        }
        Select(browser.one("#span")).select_by_value("12m")
        browser.until_text("#period-title", "Last 12 months")
        assert "span=12m" in browser.driver.current_url
        browser.driver.refresh()
        browser.until_text(".chart h3", "Tokens by key")
        browser.until_text("#period-title", "Last 12 months")
        columns = browser.driver.find_elements("css selector", ".chart:last-child .column")
        assert len(columns) == 12
        browser.keep("usage-year")
        Select(browser.one("#by")).select_by_value("status")
        Select(browser.one("#span")).select_by_value("24h")
        browser.until_text(".chart h3", "Tokens by status")
        browser.until(lambda: len(browser.driver.find_elements("css selector", ".chart:last-child .column")) == 24)
        browser.keep("usage-hours")

    await in_browser(look)


async def test_budgets_are_bars_with_their_numbers(month: Site, browser: "Browser") -> None:
    def look() -> None:
        browser.open(month.page)
        browser.until(lambda: len(browser.driver.find_elements("css selector", ".budget")) == 3)
        facts = {
            e.find_element("css selector", "strong").text: e
            for e in browser.driver.find_elements("css selector", ".budget")
        }
        assert "left of 100.00" in facts["monthly"].text
        assert "for key key-1" in facts["tokens"].text
        assert "no hard limit" in facts["watched"].text
        browser.keep("usage-budgets")

    await in_browser(look)


async def test_live_totals_update_on_the_open_page(month: Site, browser: "Browser") -> None:
    await in_browser(lambda: browser.open(month.page))
    await in_browser(lambda: browser.until_text("#live-state", "Live"))
    g = running(900, 30)
    await month.ledger.commit(0, (60, 61), NOW, [g])
    await in_browser(lambda: browser.until_text("#live-tiles", "30 tokens so far"))
    await month.ledger.commit(0, (61, 62), NOW, [], [running(900, 77)])
    await in_browser(lambda: browser.until_text("#live-tiles", "77 tokens so far"))
    assert "30 tokens" not in await in_browser(lambda: browser.text("#live-tiles"))


async def test_a_statement_is_shown_printed_and_saved(month: Site, browser: "Browser", tmp_path: Path) -> None:
    name = datetime.now(UTC).strftime("%Y-%m")
    expected = (await month.stage.http.get(f"{month.billing}/v1/statements/{name}")).json()

    def look() -> None:
        browser.driver.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
        )
        browser.open(month.page)
        browser.until(lambda: browser.visible("#statement-form"))
        browser.driver.execute_script("window.print = () => { document.title = 'printed' }")
        browser.click("#statement-print")
        browser.until(lambda: browser.driver.title == "printed")
        assert browser.text("#statement h4") == f"Statement {name}"
        for currency, amount in expected["amounts"].items():
            assert f"{amount} {currency}" in browser.text(".statement-total")
        assert len(cells(browser, "#statement")) == len(expected["lines"])
        browser.click("#statement-json")
        browser.click("#statement-csv")
        files = [tmp_path / f"statement-{name}.{ending}" for ending in ("json", "csv")]
        browser.until(lambda: all(file.exists() for file in files))
        assert json.loads(files[0].read_text()) == expected
        assert files[1].read_text().startswith("provider,model,status")
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert not browser.visible("#charts")
        assert browser.visible("#statement table")
        browser.keep("usage-print")
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
        assert browser.complaints() == []

    await in_browser(look)


async def test_an_empty_ledger_shows_the_empty_state(
    broker: Broker, nats_url: str, tmp_path: Path, browser: "Browser"
) -> None:
    async with site(nats_url, tmp_path, []) as made:

        def look() -> None:
            browser.open(made.page)
            browser.until(lambda: browser.visible("#nothing"))
            assert browser.visible("#no-budgets")
            assert not browser.visible("#charts svg")
            browser.keep("usage-empty")
            assert browser.complaints() == []

        await in_browser(look)


async def test_unavailable_billing_is_reported_with_a_button_to_retry(
    broker: Broker, nats_url: str, tmp_path: Path, browser: "Browser"
) -> None:
    async with site(nats_url, tmp_path, history(20), serve=False) as made:

        def away() -> None:
            browser.open(made.page)
            browser.until_text("#problem-title", "Billing does not answer")
            assert not browser.visible("#loading")
            browser.keep("usage-away")

        def back() -> None:
            browser.click("#problem-action")
            browser.until(lambda: browser.visible("#charts svg"))
            assert not browser.visible("#problem")
            browser.until_text("#live-state", "Live")

        await in_browser(away)
        port = int(httpx.URL(made.billing).port or 0)
        async with (
            open_engine(database_url(f"sqlite:///{tmp_path}/billing.db")) as engine,
            asked(engine, port, made.url, keyed=False),
        ):
            await in_browser(back)


async def test_a_key_is_asked_for_and_sent_to_billing(
    broker: Broker, nats_url: str, tmp_path: Path, browser: "Browser"
) -> None:
    async with site(nats_url, tmp_path, history(40), keyed=True) as made:

        def look() -> None:
            browser.open(made.page)
            browser.until(lambda: browser.visible("#key-dialog"))
            browser.one("#key").send_keys("tr_abcdef_wrong", Keys.ENTER)
            browser.until_text("#key-fault", "not valid")
            assert browser.visible("#key-dialog")
            browser.one("#key").send_keys(KEY, Keys.ENTER)
            browser.until(lambda: browser.visible("#charts svg"))
            browser.until_text("#live-state", "Live")
            assert not browser.visible("#problem")
            addresses = "return performance.getEntries().map((e) => e.name).join(' ')"
            assert KEY not in browser.driver.execute_script(addresses)

        await in_browser(look)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "size"), [("desktop", (1280, 2300)), ("phone", (360, 1500))])
async def test_nothing_overflows_in_any_width_or_theme(
    month: Site, browser: "Browser", scheme: str, name: str, size: tuple[int, int]
) -> None:
    await month.ledger.commit(0, (60, 61), NOW, [running(901, 42)])

    def look() -> None:
        browser.prefer(scheme)
        browser.size(*size)
        browser.open(month.page)
        browser.until(lambda: browser.visible("#charts svg"))
        browser.until_text("#live-state", "Live")
        browser.click("#statement-form [type=submit]")
        browser.until(lambda: browser.visible("#statement table"))
        browser.keep(f"usage-{name}-{scheme}")
        browser.driver.execute_script("document.querySelector('#usage').scrollTo(0, 1e6)")
        browser.keep(f"usage-{name}-{scheme}-end")
        assert overflow(browser) == []
        assert browser.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert browser.complaints() == []

    await in_browser(look)


async def test_the_sessions_page_and_the_usage_page_link_to_each_other(month: Site, browser: "Browser") -> None:
    def look() -> None:
        browser.open(month.url)
        browser.click("#usage-link")
        browser.until(lambda: browser.visible("#charts svg"))
        browser.click(".pages a")
        browser.until(lambda: browser.visible("#composer"))
        assert browser.complaints() == []

    await in_browser(look)


async def test_the_content_security_policy_forbids_inline_content(month: Site) -> None:
    answer = await month.stage.http.get(month.page)
    policy = answer.headers["content-security-policy"]
    assert "script-src 'self'; style-src 'self'" in policy
    assert month.billing in policy
    assert "unsafe" not in policy
