"""Test budgets through the whole pipeline: reserved by delivery, decided by billing, enforced by producers."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from schemas.events import Failed
from schemas.requests import Announcement, GenerationRecord, Request
from schemas.topology import REGISTRY_BUCKET
from services.billing.adapters.budgets import Budgets
from services.billing.adapters.prices import Prices
from services.billing.admission import Admission
from services.billing.core.budgets import Budget
from services.billing.core.reconciliation import Policy
from services.billing.terms import CurrentTerms
from services.delivery.requests.budgets import BudgetReservations as Asking
from services.kit.clock import SystemClock
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.errors import APIError
from services.kit.problem import Problem
from tests.conftest import NatsServer, eventually
from tests.support.billing_process import running, sqlite
from tests.support.delivery_server import Stage, delivering
from tests.support.producer_worker import ask, ended_log, producing


class Pipeline:
    """Delivery, a producer and billing, and the budgets between them."""

    def __init__(self, stage: Stage, broker: Broker, budgets: Budgets, admission: Admission) -> None:
        self.stage = stage
        self.broker = broker
        self.budgets = budgets
        self.admission = admission

    async def limit(self, hard: int, **fields: Any) -> None:
        made = {"tenant": "default", "name": "b", "period": "month", "unit": "tokens", "hard": Decimal(hard)}
        await self.budgets.put(Budget(**(made | fields)), 0)
        await self.admission.notify("default", has_budgets=True)

    async def ask(self, session: str = "s", **params: Any) -> Any:
        body = {
            "model": "scripted/story",
            "messages": [{"role": "user", "content": "rivers"}],
            "params": {"tokens": 20, "tokens_per_second": 500, "max_tokens": 20} | params,
        }
        return await self.stage.http.post(f"{self.stage.url}/v1/sessions/{session}/generations", json=body)

    async def spent(self) -> tuple[int, int]:
        (standing,) = await self.budgets.standings("default", round(SystemClock().wall() * 1_000))
        return int(standing.spent), int(standing.reserved)


@asynccontextmanager
async def pipeline(nats: str, folder: Path, **settings: Any) -> AsyncIterator[Pipeline]:
    clock, stop = SystemClock(), asyncio.Event()
    async with (
        delivering(nats, **settings) as stage,
        Broker.connect(nats, "test-billing") as broker,
        running(broker, sqlite(folder), policy=Policy(grace=0)) as run,
        producing(broker, slots=200),
    ):
        budgets = Budgets(run.ledger.engine)
        admission = Admission(broker, budgets, CurrentTerms(Prices(run.ledger.engine)), clock, keep=3_600)
        task = asyncio.create_task(admission.run(stop))
        try:
            yield Pipeline(stage, broker, budgets, admission)
        finally:
            stop.set()
            await task


@pytest.fixture
async def whole(own_nats: NatsServer, tmp_path: Path) -> AsyncIterator[Pipeline]:
    async with pipeline(own_nats.url, tmp_path) as made:
        yield made


async def test_a_hundred_concurrent_starts_do_not_exceed_a_budget_for_ten(whole: Pipeline) -> None:
    await whole.limit(1)
    refused = await whole.ask()
    assert refused.status_code == 402
    assert refused.json()["type"] == "urn:tailrace:problem:budget-exceeded"
    assert int(refused.headers["retry-after"]) > 0

    await whole.limit(10_000)
    assert (await whole.ask("probe")).status_code == 202
    one = (await whole.spent())[1]
    await eventually(lambda: _is_settled(whole), timeout=20)
    used = (await whole.spent())[0]
    await whole.limit(used + 10 * one + one // 2)
    answers = await asyncio.gather(*(whole.ask(f"s{n}", tokens_per_second=5) for n in range(100)))
    assert Counter(a.status_code for a in answers) == {202: 10, 402: 90}
    await eventually(lambda: _is_settled(whole), timeout=30)
    assert (await whole.spent())[0] == used + 10 * used


async def _is_settled(whole: Pipeline) -> bool:
    spent, reserved = await whole.spent()
    return spent > 0 and reserved == 0


async def test_a_lowered_limit_stops_running_generations_and_bills_their_usage(whole: Pipeline) -> None:
    await whole.limit(100_000)
    generation = (await whole.ask(tokens=2_000, tokens_per_second=50, max_tokens=2_000)).json()["generation"]
    url = f"{whole.stage.url}/v1/sessions/s/generations/{generation}"

    async def speaks() -> bool:
        return ((await whole.stage.http.get(url)).json().get("counted") or {}).get("output", 0) > 10

    await eventually(speaks, timeout=20, interval=0.1)
    await whole.limit(5)
    failed = (await ended_log(whole.broker, ask(generation), timeout=20))[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "budget_exceeded"
    await eventually(lambda: _is_settled(whole), timeout=20)
    spent, _ = await whole.spent()
    assert spent == failed.counted.input + failed.counted.output
    assert (await whole.ask()).status_code == 402


async def test_a_refused_request_creates_no_session_and_no_reservation(whole: Pipeline) -> None:
    await whole.limit(1)
    assert (await whole.ask("refused")).status_code == 402
    assert (await whole.stage.http.get(f"{whole.stage.url}/v1/sessions/refused")).status_code == 404
    assert await whole.spent() == (0, 0)


async def test_a_refusal_for_credentials_limited_to_sessions_does_not_describe_the_budget(whole: Pipeline) -> None:
    await whole.limit(1, name="secret-plan")
    told = await whole.ask()
    assert "secret-plan" in told.json()["detail"]
    asking = Asking(whole.stage.broker, SystemClock(), output=100, fallback="refuse")
    record = GenerationRecord(
        tenant="default", session="s", generation="g", state="queued", model="m", created_at=SystemClock().wall()
    )
    request = Request(tenant="default", session="s", generation="g", model="m", messages=[], params={})
    with pytest.raises(Problem) as caught:
        await asking.reserve(record, ["scripted/story"], request, names_budget=False)
    detail = caught.value.details.detail
    assert caught.value.status == 402
    assert "its period ends at" in detail
    assert "secret-plan" not in detail
    assert "tokens" not in detail


async def test_without_billing_a_tenant_with_budgets_starts_nothing_unless_that_is_allowed(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    body = {"model": "scripted/story", "messages": [{"role": "user", "content": "x"}]}
    async with pipeline(own_nats.url, tmp_path) as whole:
        await whole.limit(100_000)
    async with delivering(own_nats.url) as strict, delivering(own_nats.url, budget_fallback="allow") as lenient:
        bucket = await strict.broker.bucket(REGISTRY_BUCKET)
        await bucket.put("pool.default", b'{"providers":["scripted"]}')
        refused = await strict.http.post(f"{strict.url}/v1/sessions/a/generations", json=body)
        allowed = await lenient.http.post(f"{lenient.url}/v1/sessions/b/generations", json=body)
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:tailrace:problem:budget-unknown")
    assert allowed.status_code == 202
    assert Announcement(providers=["scripted"]).candidates("scripted/story") == ["scripted/story"]


async def test_a_refused_append_does_not_end_the_watch_over_budgets(
    whole: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Billing publishes to delivery which tenants have budgets, and repeats it when the broker refuses to store it."""

    async def refused(*_: Any, **__: Any) -> int:
        raise APIError(503, 10077, "no space")

    monkeypatch.setattr(whole.admission._broker, "publish_stored", refused)
    with pytest.raises(BrokerUnavailable, match="does not store"):
        await whole.admission.notify("default", has_budgets=True)
