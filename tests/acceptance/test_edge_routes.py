"""The edge's routing table, under a real nginx, for every path of both services."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest

from bench.processes import free_port
from services.kit.api_docs import ASSETS
from services.kit.jetstream.broker import Broker
from tests.acceptance.test_api_docs import billing_at
from tests.acceptance.test_http2_edge import Edge
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, Stage, delivering, keys, story
from tests.support.sse_client import SseClient

pytestmark = pytest.mark.acceptance
OWN_PROBES = {"/healthz", "/readyz", "/metrics"}
PAGES = {
    "delivery": ["/", "/console/usage", "/console/config.json", "/console/main.js", "/docs", "/docs/openapi.json"],
    "billing": ["/docs/billing", "/docs/billing/openapi.json"],
}
"""What the documents do not list."""


class Stages(NamedTuple):
    edge: Edge
    url: str
    services: dict[str, str]
    stage: Stage
    http: httpx.AsyncClient

    async def documents(self) -> dict[str, dict[str, Any]]:
        paths = {"delivery": "/docs/openapi.json", "billing": "/docs/billing/openapi.json"}
        return {name: (await self.http.get(self.services[name] + path)).json() for name, path in paths.items()}

    def last_upstream(self) -> str:
        return str(self.log()[-1]["upstream"])

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.edge.folder / "access.log").read_text().splitlines()]

    async def raw(self, target: str, *, head: str = "GET") -> tuple[int, bytes]:
        """Ask for a target exactly as it is written; return status and whole answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.edge.http1)
        try:
            writer.write(f"{head} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            async with asyncio.timeout(20):
                answer = await reader.read()
        finally:
            writer.close()
        return int(answer.split()[1]), answer


@pytest.fixture
async def stages(broker: Broker, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Stages]:
    (tmp_path / "edge").mkdir()
    async with (
        delivering(nats_server.url, console=True) as stage,
        billing_at(broker, nats_server.url, tmp_path) as billing,
        httpx.AsyncClient(timeout=20) as http,
    ):
        edge = Edge(tmp_path / "edge", stage.url, "127.0.0.1:1", billing).start()
        try:
            await eventually(edge.answers)
            services = {"delivery": stage.url, "billing": billing}
            yield Stages(edge, f"http://127.0.0.1:{edge.http1}", services, stage, http)
        finally:
            edge.stop()


async def test_every_documented_operation_reaches_its_service(stages: Stages) -> None:
    count = 0
    for service, document in (await stages.documents()).items():
        for template, item in document["paths"].items():
            if template in OWN_PROBES:
                continue
            # Names of no subject: every operation refuses them or finds nothing, and streams end at once.
            path = re.sub(r"{\w+}", "no.name", template)
            for method in item.keys() & {"get", "put", "post", "delete", "patch"}:
                target = f"{path}?wait=0"
                direct = await stages.http.request(method, stages.services[service] + path, params={"from": "nothing"})
                passed = await stages.http.request(method, stages.url + path, params={"from": "nothing"})
                assert stages.last_upstream() == urlsplit(stages.services[service]).netloc, f"{method} {target}"
                assert passed.status_code == direct.status_code, f"{method} {target}"
                assert passed.status_code != 502
                count += 1
    assert count > 25


async def test_pages_and_their_assets_reach_their_service(stages: Stages) -> None:
    for service, paths in PAGES.items():
        docs = "/docs" if service == "delivery" else "/docs/billing"
        for path in [*paths, *(f"{docs}/assets/{name}" for name in ASSETS)]:
            passed = await stages.http.get(stages.url + path)
            assert passed.status_code == 200, path
            assert stages.last_upstream() == urlsplit(stages.services[service]).netloc
            assert passed.content == (await stages.http.get(stages.services[service] + path)).content


@pytest.mark.parametrize("name", ["metrics", "readyz"])
async def test_service_probes_are_not_reachable_under_any_spelling(stages: Stages, name: str) -> None:
    spellings = [
        f"/{name}",
        f"/{name}/",
        f"/{name}//",
        f"/{name}?x=1",
        f"/{name}%2f",
        f"/{name}%2F%2e",
        f"/{name}%20",
        f"/{name}%09",
        f"/{name};x",
        f"/{name}.json",
        f"/{name}/x",
        f"/{name}/.",
        f"/{name}/..//{name}",
        f"//{name}",
        f"///{name}/",
        f"/./{name}",
        f"/x/../{name}",
        f"/v1/../{name}",
        f"/v1/..%2f{name}",
        f"/v1/%2e%2e/{name}",
        f"/v1/%2e%2e%2f{name}",
        f"/v1/usage/../../{name}",
        f"/docs/..;/{name}",
        f"/docs/../{name}",
        f"/console/../{name}/",
        f"/v1//..//{name}",
        f"/%2e/{name}",
        f"/%2f{name}",
        f"/{name.upper()}",
        f"/{name.title()}/",
        "/" + "".join(f"%{ord(letter):02x}" for letter in name),
        "/" + "".join(f"%25{ord(letter):02x}" for letter in name),
        f"/\\{name}",
        f"/v1/\\..\\{name}",
        f"/{name}%00",
        f"/{name}%23",
        f"/{name}#/../v1/sessions",
        f"/{name}%3f/../v1/sessions",
        f"/{name}/../v1/sessions",
        f"http://x/{name}",
        f"http://x//{name}/",
        f"http://x/v1/../{name}",
    ]
    for spelling in spellings:
        for head in ("GET", "HEAD", "OPTIONS"):
            status, answer = await stages.raw(spelling, head=head)
            assert status in (400, 404, 405), (spelling, head, answer[:300])
            assert b"tailrace_" not in answer, spelling
            assert b"checks" not in answer, spelling
    assert (await stages.http.get(stages.url + "/healthz")).json() == {"status": "ok"}


async def test_a_path_outside_the_table_is_404_and_reaches_no_upstream(stages: Stages) -> None:
    for path in ("/schema", "/schema/openapi.json", "/v2/sessions", "/v1x", "/docsx", "/favicon.ico"):
        answer = await stages.http.get(stages.url + path)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["type"] == "urn:tailrace:problem:not-found"
        assert stages.last_upstream() == ""


async def test_access_and_error_log_of_the_edge_have_no_queries(stages: Stages, broker: Broker) -> None:
    """Also with an unreachable replica, where nginx logs the most."""
    await Log(broker).append(*story("g1"))
    secret = "tk_verysecret"
    path = f"/v1/sessions/s/events?generation=g1&ticket={secret}"
    assert (await stages.http.get(stages.url + path)).status_code == 200
    text = (stages.edge.folder / "nginx.conf").read_text()
    away = f"127.0.0.1:{free_port()}"
    (stages.edge.folder / "nginx.conf").write_text(text.replace(urlsplit(stages.stage.url).netloc, away))
    stages.edge.stop()
    stages.edge.start()
    await eventually(stages.edge.answers)
    for target in (path, f"/metrics?ticket={secret}", f"/v1/ws?ticket={secret}", f"/v1/%zz?ticket={secret}"):
        status, _ = await stages.raw(target)
        assert status in (400, 404, 502, 503)
    entry = next(line for line in stages.log() if line["upstream"] == away)
    assert (entry["path"], entry["upstream_status"]) == ("/v1/sessions/s/events", "502")
    for name in ("access.log", "error.log"):
        assert secret not in (stages.edge.folder / name).read_text()


async def test_large_bodies_pass_and_are_refused_by_their_head_with_the_service_s_own_answer(stages: Stages) -> None:
    url = f"{stages.url}/v1/sessions/s/generations"
    limit = stages.stage.broker.client.max_payload - 65_536
    answer = await stages.http.post(url, content=b" " * limit, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400  # read to its end, and empty
    for _ in range(5):
        answer = await stages.http.post(url, content=b"x" * (8 * limit))
        assert answer.status_code == 413, answer.text
        assert f"{limit} bytes" in answer.json()["detail"]
    reader, writer = await asyncio.open_connection("127.0.0.1", stages.edge.http1)
    writer.write(b"POST /v1/sessions/s/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
    async with asyncio.timeout(20):
        assert b" 413 " in await reader.readline()
    writer.close()


async def test_only_websockets_are_passed_on_as_upgrades(stages: Stages) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stages.edge.http1)
    writer.write(
        b"GET /v1/ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"
    )
    async with asyncio.timeout(20):
        assert b" 426 " in await reader.readline()
    writer.close()


async def test_a_stream_passes_the_edge_over_http_1(stages: Stages, broker: Broker) -> None:
    events = story("g1")
    await Log(broker).append(*events)
    reader = SseClient(stages.http, f"{stages.url}/v1/sessions/s/events", generation="g1")
    await reader.follow(lambda r: len(r.events) >= len(events))
    assert keys(reader.events) == keys(events)
