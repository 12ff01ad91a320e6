"""Test budgets on SQLite and PostgreSQL: concurrent reservations and their settlement."""

import asyncio
from decimal import Decimal

import msgspec
import pytest
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from schemas.budgets import Release, Reserve
from services.billing.adapters.budgets import Budgets
from services.billing.adapters.database import open_engine
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.worklist import Money
from services.billing.core.budgets import Budget, Need, Overrun, Verdict, corrected
from services.billing.core.generation import Generation
from services.billing.core.spending import released, steps
from services.billing.database_url import database_url
from services.billing.overruns import report_limits, report_overruns
from tests.support.billing_database import database, engine, postgres_server, postgres_url
from tests.support.billing_histories import START
from tests.support.delivery_server import metric

__all__ = ["database", "engine", "postgres_server", "postgres_url"]
NOW = round(START * 1_000)
LATER = NOW + 3_600_000
DAY = 86_400_000


@pytest.fixture
def budgets(engine: AsyncEngine) -> Budgets:
    return Budgets(engine)


def budget(name: str = "b", **fields: object) -> Budget:
    made = {"tenant": "default", "name": name, "period": "day", "unit": "tokens", "hard": Decimal(1_000)} | fields
    return Budget(**made)  # type: ignore[arg-type]


def wish(generation: str, key: str = "", tenant: str = "default") -> Reserve:
    return Reserve(tenant=tenant, session="s", generation=generation, key=key)


def need(tokens: int = 100, **money: str) -> Need:
    return Need(tokens, {currency: Decimal(amount) for currency, amount in money.items()})


async def reserve(budgets: Budgets, wish: Reserve, need: Need) -> Verdict:
    (verdict,) = await budgets.reserve(wish.tenant, [(wish, need)], NOW, LATER)
    return verdict


def ended(name: str, tokens: int, amount: str = "0", **fields: object) -> Generation:
    made: dict[str, object] = {
        "tenant": "default",
        "session": "s",
        "generation": name,
        "partition": 0,
        "state": "completed",
        "status": "matched",
        "started_at": NOW,
        "tokens": tokens,
        "amount": Decimal(amount),
        "currency": "USD" if Decimal(amount) else "",
        "pricing": "charged",
    }
    return Generation(**(made | fields))  # type: ignore[arg-type]


async def settle(ledger: Ledger, *after: Generation, before: tuple[Generation, ...] = ()) -> list[Overrun]:
    known = {g.key: g for g in before}
    at = await ledger.acquire(0, "log", NOW) or 0
    money = Money(revision=0, spending=steps(known, after), released=released(known, after))
    return await ledger.commit(0, (at, at + 1), NOW, after, (), money)


async def test_a_hundred_concurrent_reservations_cannot_exceed_a_budget_for_ten(
    database: str, budgets: Budgets
) -> None:
    await budgets.put(budget(), NOW)
    async with open_engine(database_url(database)) as second:
        replicas = (budgets, Budgets(second))
        asked = (reserve(replicas[n % 2], wish(f"g{n}"), need(100)) for n in range(100))
        verdicts = await asyncio.gather(*asked)
    assert sum(v.refused is None for v in verdicts) == 10
    (standing,) = await budgets.standings("default", NOW)
    assert (standing.spent, standing.reserved) == (0, 1_000)


async def test_settlement_frees_the_unused_part_of_a_reservation(budgets: Budgets, engine: AsyncEngine) -> None:
    await budgets.put(budget(hard=Decimal(150)), NOW)
    assert (await reserve(budgets, wish("a"), need(100))).refused is None
    assert (await reserve(budgets, wish("b"), need(100))).refused is not None
    await settle(Ledger(engine, "one"), ended("a", 40))
    assert (await reserve(budgets, wish("b"), need(100))).refused is None
    (standing,) = await budgets.standings("default", NOW)
    assert (standing.spent, standing.reserved) == (40, 100)


async def test_usage_beyond_its_reservation_is_logged_once_with_the_exceeded_limit(
    budgets: Budgets, engine: AsyncEngine
) -> None:
    def counted() -> list[float]:
        kinds = [metric("tailrace_billing_reservation_overruns_total", kind=kind) for kind in ("tokens", "money")]
        amounts = [metric("tailrace_billing_reservation_overrun_amount_total", unit=u) for u in ("tokens", "USD")]
        return [*kinds, *amounts, metric("tailrace_billing_hard_limits_passed_total")]

    await budgets.put(budget("tokens", hard=Decimal(1_000)), NOW)
    await budgets.put(budget("money", unit="USD", hard=Decimal("1.8")), NOW)
    for name in ("within", "beyond", "passes"):
        assert (await reserve(budgets, wish(name), need(100, USD="0.5"))).refused is None
    ledger, before = Ledger(engine, "one"), counted()
    assert await settle(ledger, ended("within", 100, "0.5"), ended("unreserved", 10, "0.1")) == []
    over = await settle(ledger, ended("beyond", 130, "0.5"))
    assert [(o.generation.generation, o.unit, o.expected, o.used) for o in over] == [("beyond", "tokens", 100, 130)]
    with structlog.testing.capture_logs() as logs:
        await report_overruns(budgets, over)
    assert [entry["event"] for entry in logs] == ["used more than was reserved"]
    over = await settle(ledger, ended("passes", 100, "0.75"))
    assert [(o.unit, o.expected, o.used) for o in over] == [("USD", Decimal("0.5"), Decimal("0.75"))]
    with structlog.testing.capture_logs() as logs:
        await report_overruns(budgets, over)
    assert [entry["log_level"] for entry in logs] == ["warning", "error"]
    assert (logs[1]["budget"], logs[1]["limit"], logs[1]["spent"]) == ("money", "1.8", "1.85")
    assert [now - was for now, was in zip(counted(), before, strict=True)] == [1, 1, 30, 0.25, 1]
    assert await settle(ledger, ended("passes", 100, "0.75"), before=(ended("passes", 100, "0.75"),)) == []


async def test_a_correction_beyond_a_hard_limit_is_reported_once(budgets: Budgets, engine: AsyncEngine) -> None:
    await budgets.put(budget(hard=Decimal(100)), NOW)
    before, ledger = metric("tailrace_billing_hard_limits_passed_total"), Ledger(engine, "one")
    first, second = ended("a", 90), ended("a", 120)
    await settle(ledger, first)
    await settle(ledger, second, before=(first,))
    for known, after, told in ((first, second, 1), (second, second, 0), (second, first, 0)):
        found = corrected({known.key: known}, [after])
        assert len(found) == told
        await report_limits(budgets, found)
    assert metric("tailrace_billing_hard_limits_passed_total") == before + 1


async def test_a_correction_changes_the_spent_amount(budgets: Budgets, engine: AsyncEngine) -> None:
    await budgets.put(budget(unit="USD", hard=Decimal("1.5")), NOW)
    ledger = Ledger(engine, "one")
    first, corrected = ended("a", 40, "1.25"), ended("a", 50, "1.000000000001")
    await settle(ledger, first)
    assert (await budgets.standings("default", NOW))[0].spent == Decimal("1.25")
    await settle(ledger, corrected, before=(first,))
    assert (await budgets.standings("default", NOW))[0].spent == Decimal("1.000000000001")
    await settle(ledger, corrected, before=(corrected,))
    assert (await budgets.standings("default", NOW))[0].spent == Decimal("1.000000000001")


async def test_a_change_of_currency_leaves_nothing_behind(budgets: Budgets, engine: AsyncEngine) -> None:
    await budgets.put(budget("usd", unit="USD"), NOW)
    await budgets.put(budget("eur", unit="EUR"), NOW)
    ledger = Ledger(engine, "one")
    first = ended("a", 40, "2")
    await settle(ledger, first)
    await settle(ledger, msgspec.structs.replace(first, currency="EUR", amount=Decimal(3)), before=(first,))
    eur, usd = await budgets.standings("default", NOW)
    assert (eur.spent, usd.spent) == (3, 0)


async def test_repeated_reservations_of_one_generation_count_once(budgets: Budgets) -> None:
    await budgets.put(budget(hard=Decimal(150)), NOW)
    for _ in range(3):
        assert (await reserve(budgets, wish("a"), need(100))).refused is None
    assert (await budgets.standings("default", NOW))[0].reserved == 100


async def test_every_covering_budget_and_no_other_counts_a_generation(budgets: Budgets) -> None:
    await budgets.put(budget("all", hard=Decimal(1_000)), NOW)
    await budgets.put(budget("key", hard=Decimal(100), key="k1"), NOW)
    await budgets.put(budget("money", unit="USD", hard=Decimal(1)), NOW)
    await budgets.put(budget("foreign", tenant="other", hard=Decimal(0)), NOW)
    assert (await reserve(budgets, wish("a", "k1"), need(100, USD="0.5"))).refused is None
    refused = (await reserve(budgets, wish("b", "k1"), need(1))).refused
    assert refused is not None
    assert refused.budget.name == "key"
    assert (await reserve(budgets, wish("b", "k2"), need(100, USD="0.5"))).refused is None
    refused = (await reserve(budgets, wish("c", "k2"), need(100, USD="0.01"))).refused
    assert refused is not None
    assert refused.budget.name == "money"


async def test_daily_and_monthly_budgets_reset_at_the_end_of_their_period(
    budgets: Budgets, engine: AsyncEngine
) -> None:
    await budgets.put(budget("day"), NOW)
    await budgets.put(budget("month", period="month"), NOW)
    ledger = Ledger(engine, "one")
    await settle(ledger, ended("a", 40), ended("b", 7, started_at=NOW - DAY))
    day, month = await budgets.standings("default", NOW)
    assert (day.spent, month.spent) == (40, 47)
    day, month = await budgets.standings("default", NOW + DAY)
    assert (day.spent, month.spent) == (0, 47)
    day, month = await budgets.standings("default", NOW + 40 * DAY)
    assert (day.spent, month.spent) == (0, 0)


async def test_expiry_returns_reservations_of_unstarted_but_not_of_running_generations(
    budgets: Budgets, engine: AsyncEngine
) -> None:
    await budgets.put(budget(), NOW)
    for name in ("never", "runs", "released"):
        await reserve(budgets, wish(name), need(100))
    await budgets.release(Release(tenant="default", session="s", generation="released"))
    ledger = Ledger(engine, "one")
    assert await ledger.acquire(0, "log", NOW) == 0
    running = ended("runs", 0, state="running", status="running", pricing="pending")
    await ledger.commit(0, (0, 1), NOW, [running])
    assert await budgets.expire(LATER) == 0
    assert await budgets.expire(LATER + 1) == 1
    assert (await budgets.standings("default", NOW))[0].reserved == 100
    (found,) = await budgets.running()
    assert (found.generation.generation, found.tokens) == ("runs", 100)


async def test_budgets_are_set_changed_and_removed(budgets: Budgets) -> None:
    assert await budgets.put(budget(soft=Decimal("0.5"), unit="USD", hard=Decimal("1.000001")), NOW)
    assert not await budgets.put(budget(period="month", unit="EUR", hard=None, soft=Decimal(7)), NOW)
    (standing,) = await budgets.standings("default", NOW)
    assert standing.budget == budget(period="month", unit="EUR", hard=None, soft=Decimal(7))
    assert await budgets.tenants() == ["default"]
    assert await budgets.delete("default", "b")
    assert not await budgets.delete("default", "b")
    assert await budgets.tenants() == []
