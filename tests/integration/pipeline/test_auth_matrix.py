"""Test tenant x scope x operation, for every operation in the OpenAPI documents of both services.

An operation that does not document its scope, or does not enforce it, fails here; new operations are included.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from bench.processes import free_port
from services.billing.adapters.database import migrate, open_engine
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.reports import Reports
from services.billing.api import build_api
from services.billing.database_url import sqlite_url
from services.kit.auth.config import build_authenticator
from services.kit.auth.middleware import entering, is_public
from services.kit.clock import SystemClock
from services.kit.http import serving
from services.kit.jetstream.broker import Broker
from tests.support.credentials import SCOPES, bearer, guarded, requiring, token

METHODS = ("get", "post", "put", "patch", "delete")
NAMES = {
    "session": "s",
    "generation": "g1",
    "name": "c1",
    "key": "abcdef",
    "event": "1",
    "budget": "b1",
    "month": "2026-01",
}
FREE = {"healthz", "readyz"}
OPERATORS = {"put_prices"}
"""Operations on what belongs to all tenants: an administrator of one is refused."""


def filled(path: str, names: dict[str, str]) -> str:
    """Return a path with names in place of its parameters; those that are not known get any."""
    return re.sub(r"{(\w+)}", lambda found: names.get(found[1], "x1"), path)


class Operation(NamedTuple):
    service: str
    id: str
    method: str
    path: str
    scope: str | None

    def __str__(self) -> str:
        return f"{self.service} {self.method.upper()} {self.path}"


class Services(NamedTuple):
    urls: dict[str, str]
    operations: list[Operation]
    http: httpx.AsyncClient

    async def call(self, operation: Operation, credential: str | None) -> httpx.Response:
        """Call an operation with names that exist nowhere, and read no more than the head of its answer."""
        path = filled(operation.path, NAMES)
        headers = bearer(credential) if credential else {}
        body = {} if operation.method in ("get", "delete") else {"json": {}}
        async with self.http.stream(
            operation.method.upper(), self.urls[operation.service] + path, headers=headers, **body
        ) as answer:
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                await answer.aread()
            return answer


@asynccontextmanager
async def billing(broker: Broker, url: str, folder: Path) -> AsyncIterator[str]:
    """Run billing's API on an empty database."""

    async def yes() -> bool:
        return True

    shared = requiring(url, folder)
    async with open_engine(sqlite_url(str(folder / "billing.db"))) as engine:
        await migrate(engine)
        authenticator = build_authenticator(shared, "127.0.0.1", broker, SystemClock())
        api = build_api(Reports(engine), {"database": Ledger(engine, "test").answers, "broker": yes})
        port = free_port()
        async with authenticator.running(), serving(entering(api, authenticator), "127.0.0.1", port):
            yield f"http://127.0.0.1:{port}"


def operations(service: str, document: dict[str, Any]) -> list[Operation]:
    found = []
    for path, item in document["paths"].items():
        for method in METHODS:
            if method not in item:
                continue
            scopes = [s for each in item[method].get("security", []) for s in each.get("credentials", [])]
            assert len(scopes) <= 1, f"{method} {path} names several scopes"
            id_ = item[method].get("operationId", f"{method} {path}")
            found.append(Operation(service, id_, method, path, scopes[0] if scopes else None))
    return found


@pytest.fixture
async def services(broker: Broker, nats_url: str, tmp_path: Path) -> AsyncIterator[Services]:
    async with guarded(nats_url, tmp_path) as stage, billing(broker, nats_url, tmp_path) as url:
        urls = {"delivery": stage.url, "billing": url}
        described = {
            "delivery": (await stage.http.get(f"{stage.url}/docs/openapi.json")).json(),
            "billing": (await stage.http.get(f"{url}/docs/billing/openapi.json")).json(),
        }
        found = [each for service, document in described.items() for each in operations(service, document)]
        yield Services(urls, found, stage.http)


async def test_every_operation_documents_its_scope(services: Services) -> None:
    assert len(services.operations) > 15
    silent = [str(o) for o in services.operations if o.scope is None and o.id not in FREE]
    assert silent == []
    assert {o.scope for o in services.operations if o.scope} <= set(SCOPES)
    assert {o.id for o in services.operations if o.scope is None} == FREE


async def test_only_operations_documented_as_public_need_no_credentials(services: Services) -> None:
    wrong = []
    for operation in services.operations:
        answer = await services.call(operation, None)
        is_open = answer.status_code != 401
        if is_open != (operation.id in FREE) or is_open != is_public(operation.path):
            wrong.append((str(operation), answer.status_code))
    assert wrong == []


async def test_each_scope_allows_only_its_own_operations(services: Services) -> None:
    wrong = []
    for scope in SCOPES:
        credential = token("acme", scope)
        for operation in services.operations:
            if operation.scope is None:
                continue
            answer = await services.call(operation, credential)
            status = answer.status_code
            if status == 401 or status >= 500:
                wrong.append((scope, str(operation), status, answer.text[:200]))
            elif scope != operation.scope and status != 403:
                wrong.append((scope, str(operation), status))
            elif scope == operation.scope and status == 403 and operation.id not in OPERATORS:
                wrong.append((scope, str(operation), status, answer.text[:200]))
    assert wrong == []


async def test_all_other_scopes_together_are_not_enough(services: Services) -> None:
    wrong = []
    for operation in services.operations:
        if operation.scope is None:
            continue
        rest = [scope for scope in SCOPES if scope != operation.scope]
        answer = await services.call(operation, token("acme", *rest))
        if answer.status_code != 403:
            wrong.append((str(operation), answer.status_code))
    assert wrong == []


async def told_apart(services: Services, operation: Operation, tenant: str) -> tuple[int, str]:
    answer = await services.call(operation, token(tenant, *SCOPES))
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        return answer.status_code, ""
    text = answer.text.replace(f'"{tenant}"', '"T"')
    return answer.status_code, text


async def test_data_of_one_tenant_is_invisible_to_another(
    services: Services,
) -> None:
    """Fill one tenant; then two other, empty tenants must get identical answers."""
    owner = bearer(token("acme", *SCOPES))
    delivery = services.urls["delivery"]
    wish = {"model": "scripted/story", "messages": [{"role": "user", "content": "x"}]}
    made = await services.http.post(f"{delivery}/v1/sessions/s/generations", json=wish, headers=owner)
    assert made.status_code == 202
    await services.http.put(f"{delivery}/v1/consumers/c1", json={"session": "s"}, headers=owner)
    key = await services.http.post(f"{delivery}/v1/keys", json={"scopes": ["read"]}, headers=owner)
    known = {"generation": made.json()["generation"], "key": key.json()["id"]}
    wrong = []
    for operation in services.operations:
        if (
            operation.scope is None
            or operation.method == "put"
            or (operation.method == "post" and "{" not in operation.path)
        ):
            continue
        there = operation._replace(path=filled(operation.path, NAMES | known))
        foreign, nobody = await told_apart(services, there, "globex"), await told_apart(services, there, "nobody")
        if foreign != nobody:
            wrong.append((str(operation), foreign, nobody))
    assert wrong == []
    listed = await services.http.get(f"{delivery}/v1/keys", headers=owner)
    assert [k["id"] for k in listed.json()["keys"]] == [key.json()["id"]]
    kept = await services.http.get(f"{delivery}/v1/sessions/s", headers=owner)
    assert kept.json()["generations"][0]["state"] == "queued"


async def test_other_spellings_of_a_path_do_not_bypass_authentication(services: Services) -> None:
    for path in ("//v1/sessions", "/v1//sessions", "/v1/sessions/", "/%76%31/sessions", "/console/../v1/sessions"):
        answer = await services.http.get(services.urls["delivery"] + path)
        assert answer.status_code in (401, 404), path
        raw = await raw_get(services.urls["delivery"], path)
        assert raw in (401, 404), path


async def raw_get(url: str, path: str) -> int:
    """Send a path as it is; httpx would tidy it up."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    status = int((await reader.readline()).split()[1])
    writer.close()
    return status


async def test_the_openapi_documents_have_no_example_credentials(services: Services) -> None:
    for service, path in (("delivery", "/docs/openapi.json"), ("billing", "/docs/billing/openapi.json")):
        document = json.dumps((await services.http.get(services.urls[service] + path)).json())
        assert "Bearer eyJ" not in document
        assert "tr_" not in document.replace("tr_<id>", "")
