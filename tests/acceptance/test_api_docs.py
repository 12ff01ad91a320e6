"""The documentation pages of both APIs in a real browser: offline, under their own policy."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from bench.processes import free_port
from services.billing.adapters.database import migrate, open_engine
from services.billing.adapters.reports import Reports
from services.billing.api import build_api
from services.billing.database_url import sqlite_url
from services.kit.api_docs import ASSETS
from services.kit.auth.config import build_authenticator
from services.kit.auth.middleware import entering
from services.kit.clock import SystemClock
from services.kit.http import serving
from services.kit.jetstream.broker import Broker
from services.kit.settings import Shared
from tests.conftest import NatsServer
from tests.support.delivery_server import delivering

if TYPE_CHECKING:
    from tests.support.browser import Browser

pytest_plugins = ("tests.support.browser",)
pytestmark = pytest.mark.acceptance
PUBLISHED = {
    "swagger-ui-bundle.js": "93b7b0862a80e2786f85b560be7693c2344354ffa7e7e224f850a54349724c31",
    "swagger-ui.css": "9e576f8322132c76949da47f9bb53c891373c303ea3a761ff548ffc9de50a98c",
}
"""SHA-256 of the files as the project Swagger UI publishes them in swagger-ui-dist 5.31.0."""


@asynccontextmanager
async def billing_at(broker: Broker, nats_url: str, folder: Path) -> AsyncIterator[str]:
    """Run billing's API on an empty database while the block runs."""
    async with open_engine(sqlite_url(f"{folder}/billing.db")) as engine:
        await migrate(engine)
        authenticator = build_authenticator(Shared(nats_url=nats_url), "127.0.0.1", broker, SystemClock())
        port = free_port()
        app = entering(build_api(Reports(engine), {}), authenticator)
        async with authenticator.running(), serving(app, "127.0.0.1", port):
            yield f"http://127.0.0.1:{port}"


@pytest.fixture(params=["delivery", "billing"])
async def page(
    request: pytest.FixtureRequest, broker: Broker, nats_server: NatsServer, tmp_path: Path
) -> AsyncIterator[str]:
    """The address of a documentation page."""
    if request.param == "delivery":
        async with delivering(nats_server.url) as stage:
            yield f"{stage.url}/docs"
    else:
        async with billing_at(broker, nats_server.url, tmp_path) as url:
            yield f"{url}/docs/billing"


async def test_page_and_assets_have_a_strict_content_security_policy(page: str) -> None:
    async with httpx.AsyncClient() as http:
        for path in ("", "/", *(f"/assets/{name}" for name in ASSETS)):
            answer = await http.get(page + path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self';" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        html = (await http.get(page)).text
        assert "://" not in html
        for name in ("..%2fapi_docs.py", "swagger-ui.js", "api_docs.py"):
            assert (await http.get(f"{page}/assets/{name}")).status_code == 404
        document = await http.get(f"{page}/openapi.json")
        assert document.json()["openapi"].startswith("3.1")


def test_the_asset_files_equal_the_published_ones() -> None:
    assert {name: hashlib.sha256(ASSETS[name][0].read_bytes()).hexdigest() for name in PUBLISHED} == PUBLISHED


@pytest.mark.browser
async def test_page_shows_every_operation_and_calls_one_without_leaving_its_origin(
    page: str, browser: "Browser"
) -> None:
    async with httpx.AsyncClient() as http:
        document = (await http.get(f"{page}/openapi.json")).json()
    operations = sum(len(item.keys() & {"get", "put", "post", "delete"}) for item in document["paths"].values())
    called = "listSessions" if "listSessions" in str(document) else "list_budgets"

    def look() -> None:
        browser.open(page)
        browser.until(lambda: len(browser.driver.find_elements("css selector", ".opblock")) == operations)
        block = f"[id$='-{called}']"
        browser.click(f"{block} .opblock-summary-control")
        browser.click(f"{block} .try-out__btn")
        browser.click(f"{block} .execute")
        browser.until(lambda: browser.text(f"{block} .live-responses-table td.response-col_status") == "200")
        browser.keep(f"api_docs_{called}")
        loaded = browser.driver.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
        origin = page[: page.index("/", 8)]
        assert loaded
        assert all(name.startswith((origin + "/", "data:")) for name in loaded), loaded
        assert browser.complaints() == []
        browser.open("about:blank")

    await asyncio.to_thread(look)
