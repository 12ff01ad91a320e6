"""The usage API over real HTTP, on SQLite and PostgreSQL."""

from collections.abc import AsyncIterator

import httpx
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from bench.processes import free_port
from schemas.events import Failed
from schemas.usage import Usage
from services.billing import metrics
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.reports import Reports
from services.billing.adapters.worklist import Money
from services.billing.api import build_api
from services.billing.core.spending import steps
from services.kit.auth.middleware import entering
from services.kit.auth.principal import Principal
from services.kit.http import serving
from tests.contracts.billing.test_ledger import NOW, generation
from tests.support.billing_database import database, engine, postgres_server, postgres_url
from tests.support.billing_histories import START

__all__ = ["database", "engine", "postgres_server", "postgres_url"]
HOUR = 3_600.0
DAY = 24 * HOUR
ORIGIN = "http://127.0.0.1:8080"


class Everybody:
    is_local = False

    async def authenticate(self, authorization: str | None, ticket: str | None = None) -> Principal:
        return Principal(tenant="default", operator=True)

    def is_valid(self, principal: Principal) -> bool:
        return True


async def fill(engine: AsyncEngine) -> None:
    """Twelve generations: in two sessions, of two models, over three days."""
    rows = []
    for number in range(12):
        made = {"at": START + (number % 3) * DAY + number * 60, "model": ("gpt", "claude")[number % 2]}
        if number == 11:
            made["terminal"] = Failed
        elif number != 10:
            made["reported"] = Usage(input=7, output=30 + number, cached_input=1, reasoning=2)
        rows.append(generation(f"g{number:02}", session=f"s{number % 2}", **made))
    ledger = Ledger(engine, "test")
    await ledger.acquire(0, "first", NOW)
    await ledger.commit(0, (0, 60), NOW, rows, (), Money(revision=0, spending=steps({}, rows)))


@pytest.fixture
async def client(engine: AsyncEngine) -> AsyncIterator[httpx.AsyncClient]:
    await fill(engine)
    ledger = Ledger(engine, "test")

    async def yes() -> bool:
        return True

    api = build_api(Reports(engine), {"broker": yes, "database": ledger.answers}, [ORIGIN])
    app = entering(api, Everybody())
    port = free_port()
    async with serving(app, "127.0.0.1", port), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        yield client


async def test_a_generation_is_returned_with_all_its_fields(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/usage/generations/g04")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["status"], body["state"], body["code"], body["session"]) == ("matched", "completed", "stop", "s0")
    assert body["counted"] == {"input": 7, "output": 30, "exact": True, "encoding": "o200k_base"}
    assert body["reported"]["output"] == 34
    assert body["reported"]["cache_write"] == 0
    assert body["drift"] == {"input": 0, "output": 4}
    assert body["started_at"] == "2023-11-15T22:17:20.000Z"


async def test_a_session_has_totals_and_pages(client: httpx.AsyncClient) -> None:
    names: list[str] = []
    cursor: str | None = None
    while True:
        query = {"limit": "4"} | ({"cursor": cursor} if cursor else {})
        body = (await client.get("/v1/usage/sessions/s1", params=query)).json()
        assert body["totals"]["generations"] == 6
        assert body["totals"]["counted_output"] == 180
        names += [g["generation"] for g in body["generations"]]
        cursor = body["next"]
        if cursor is None:
            break
    assert sorted(names) == ["g01", "g03", "g05", "g07", "g09", "g11"]
    assert names == sorted(names, key=lambda n: ((int(n[1:]) % 3), n))


async def test_without_group_by_there_is_one_row_of_sums(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/usage")).json()
    assert body["rows"] == [
        {
            "key": {},
            "totals": {
                "generations": 12,
                "input": 70,
                "output": 345,
                "cached_input": 10,
                "cache_write": 0,
                "cache_write_1h": 0,
                "reasoning": 20,
                "counted_input": 84,
                "counted_output": 360,
                "drift": 45,
                "tokens": 0,
                "unpriced": 0,
                "amounts": {},
            },
        }
    ]


async def test_groups_add_up_to_the_whole_in_pages_of_any_size(client: httpx.AsyncClient) -> None:
    for group_by in ("model", "day", "hour,model", "status,provider", "tenant,session,day", "session"):
        whole = (await client.get("/v1/usage", params={"group_by": group_by})).json()
        assert whole["group_by"] == group_by.split(",")
        assert sum(row["totals"]["generations"] for row in whole["rows"]) == 12
        rows = []
        cursor: str | None = None
        while True:
            query = {"group_by": group_by, "limit": "1"} | ({"cursor": cursor} if cursor else {})
            page = (await client.get("/v1/usage", params=query)).json()
            rows += page["rows"]
            cursor = page["next"]
            if cursor is None:
                break
        assert rows == whole["rows"]


async def test_days_and_hours_are_utc(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/usage?group_by=day&group_by=hour&limit=1")).json()
    assert body["rows"][0]["key"] == {"day": "2023-11-14", "hour": "2023-11-14T22:00:00Z"}


@pytest.mark.parametrize(
    ("query", "generations"),
    [
        ("from=2023-11-15&to=2023-11-16", 4),
        ("from=2023-11-15T22:17:20Z", 7),
        ("to=2023-11-15T22:17:20Z", 5),
        ("from=2023-11-15T23:17:20%2B01:00", 7),
        ("model=gpt", 6),
        ("status=drift", 1),
        ("status=partial", 1),
        ("status=awaiting_provider", 1),
        ("provider=openai&session=s0", 6),
        ("session=s0&model=claude", 0),
        ("tenant=default", 12),
        ("model=%27%20OR%201=1", 0),
    ],
)
async def test_filters_narrow(client: httpx.AsyncClient, query: str, generations: int) -> None:
    body = (await client.get(f"/v1/usage?{query}")).json()
    assert body["rows"][0]["totals"]["generations"] == generations


async def test_another_tenant_has_nothing(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/usage?tenant=other&group_by=model")).json()
    assert body == {"group_by": ["model"], "rows": [], "next": None}


@pytest.mark.parametrize(
    "path",
    [
        "?from=yesterday",
        "?to=2026-01-01T00:00:00",
        "?from=2026-01-02&to=2026-01-01",
        "?group_by=colour",
        "?group_by=day,day",
        "?status=settled",
        "?limit=0",
        "?limit=1001",
        "?limit=many",
        "?cursor=%00",
        "?cursor=abc",
        "?group_by=model&cursor=WyJ4Il0",
        "?model=a%00b",
        "?model=" + "x" * 201,
        "?modle=gpt",
        "/sessions/s0?cursor=e30",
        "/sessions/s0?group_by=model",
        "/sessions/a%20b",
        "/generations/a.b",
        "/generations/" + "x" * 65,
    ],
)
async def test_a_bad_parameter_is_a_clear_400(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(f"/v1/usage{path}")
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == "urn:tailrace:problem:bad-request"
    assert len(answer.json()["detail"]) > 5


async def test_a_cursor_of_another_question_is_refused(client: httpx.AsyncClient) -> None:
    cursor = (await client.get("/v1/usage?group_by=session&limit=1")).json()["next"]
    answer = await client.get("/v1/usage", params={"group_by": "model", "limit": "1", "cursor": cursor})
    assert answer.status_code == 400
    assert "another query" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/v1/usage/generations/nobody", "/v1/usage/sessions/nobody", "/v1/nothing"])
async def test_unknown_paths_and_generations_are_404(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert (answer.status_code, answer.json()["status"]) == (404, 404)


async def test_probes_metrics_and_documentation_answer(client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert (await client.get("/readyz")).json() == {"status": "ok", "checks": {"broker": True, "database": True}}
    metrics.EVENTS.labels("accepted").inc()
    assert "tailrace_billing_events_total" in (await client.get("/metrics")).text
    document = (await client.get("/docs/billing/openapi.json")).json()
    parameters = document["paths"]["/v1/usage"]["get"]["parameters"]
    assert {p["name"] for p in parameters} >= {"from", "to", "group_by", "limit", "cursor"}
    assert any(p.get("examples") for p in parameters)


async def test_only_listed_origins_may_read(client: httpx.AsyncClient) -> None:
    allowed = await client.get("/v1/usage", headers={"Origin": ORIGIN})
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    foreign = await client.get("/v1/usage", headers={"Origin": "http://evil.test"})
    assert "access-control-allow-origin" not in foreign.headers
