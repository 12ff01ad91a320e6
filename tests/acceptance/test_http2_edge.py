"""The edge's own configuration, under a real nginx: HTTP/2 and gRPC through it, to a delivery that really runs."""

import asyncio
import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import httpx
import pytest
import trustme

from bench.processes import free_port
from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually, require
from tests.support.delivery_server import Log, Stage, delivering, keys, metric, story
from tests.support.grpc_server import Client, GrpcStage, Read, serving_calls
from tests.support.producer_worker import producing
from tests.support.service_processes import REPOSITORY
from tests.support.splitting_proxy import splitting
from tests.support.sse_client import SseClient

if TYPE_CHECKING:
    from tests.support.browser import Browser

pytest_plugins = ("tests.support.browser",)
pytestmark = pytest.mark.acceptance


class Edge:
    """nginx with the configuration of the deployment, its addresses replaced by those of the test."""

    def __init__(self, folder: Path, delivery: str, grpc_target: str, billing: str = "127.0.0.1:1") -> None:
        self.folder = folder
        self.http1 = free_port()
        self.http2 = free_port()
        self.tls = free_port()
        self.authority = trustme.CA()
        issued = self.authority.issue_cert("localhost", "127.0.0.1")
        (folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(folder / "key.pem"))
        tls = (REPOSITORY / "deploy/nginx/tls/tls.conf.example").read_text()
        text = (REPOSITORY / "deploy/nginx/nginx.conf").read_text()
        replaced = {
            "/tmp/": f"{folder}/",  # first: the folder itself may lie there
            '"delivery:8080"': f'"{delivery.removeprefix("http://")}"',
            '"delivery:50051"': f'"{grpc_target}"',
            '"billing:8080"': f'"{billing.removeprefix("http://")}"',
            "listen 8080;": f"listen 127.0.0.1:{self.http1};",
            "listen 8082 http2;": f"listen 127.0.0.1:{self.http2} http2;",
            "include /etc/nginx/tls/*.conf;": tls.replace("8443", f"127.0.0.1:{self.tls}"),
            "/etc/nginx/tls/": f"{folder}/",
            "/dev/stderr": f"{folder}/error.log",
            "/dev/stdout": f"{folder}/access.log",
        }
        for old, new in replaced.items():
            assert old in text, old
            text = text.replace(old, new)
        (folder / "nginx.conf").write_text(text)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Edge":
        program = shutil.which("nginx")
        require(program, "nginx is not installed")
        argv = [str(program), "-e", f"{self.folder}/error.log", "-c", f"{self.folder}/nginx.conf", "-g", "daemon off;"]
        self.process = subprocess.Popen(argv)
        return self

    async def answers(self) -> bool:
        async with httpx.AsyncClient(http1=False, http2=True) as client:
            try:
                return (await client.get(f"http://127.0.0.1:{self.http2}/healthz")).status_code == 200
            except httpx.HTTPError:
                return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url, console=True) as running:
        yield running


@pytest.fixture
async def calls(broker: Broker, nats_server: NatsServer) -> AsyncIterator[GrpcStage]:
    async with serving_calls(nats_server.url) as running:
        yield running


@pytest.fixture
def started() -> Iterator[list[Edge]]:
    edges: list[Edge] = []
    yield edges
    for one in edges:
        one.stop()
        errors = (one.folder / "error.log").read_text()
        assert not re.search(r"\[(emerg|alert|crit)\]", errors), errors


@pytest.fixture
async def edge(stage: Stage, calls: GrpcStage, started: list[Edge], tmp_path: Path) -> Edge:
    started.append(Edge(tmp_path, stage.url, calls.target).start())
    await eventually(started[0].answers)
    return started[0]


async def test_grpc_passes_the_edge_in_the_clear_and_with_tls(edge: Edge, broker: Broker) -> None:
    events = story("g1")
    await Log(broker).append(*events)
    credentials = grpc.ssl_channel_credentials(edge.authority.cert_pem.bytes())
    clear = grpc.aio.insecure_channel(f"127.0.0.1:{edge.http2}")
    secure = grpc.aio.secure_channel(f"localhost:{edge.tls}", credentials)
    for channel in (clear, secure):
        async with channel:
            got = await Read().of(Client(channel).read(pb.ReadRequest(session="s", generation="g1")))
            assert got.keys == keys(events)
            missing = Client(channel).read(pb.ReadRequest(session="s", generation="none"))
            assert await missing.code() is grpc.StatusCode.NOT_FOUND


async def test_live_events_pass_the_edge_one_by_one_and_disconnects_are_noticed(edge: Edge, broker: Broker) -> None:
    events = story("g1")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.http2}") as channel:
        call = Client(channel).attach()
        read = pb.ReadRequest(session="s")
        await call.write(pb.AttachRequest(id="one", subscribe=pb.Subscribe(read=read, credit=pb.Credit(events=50))))
        got, log = Read(), Log(broker)
        for count, event in enumerate(events, 1):
            await log.append(event)
            while len(got.events) < count:
                response = await asyncio.wait_for(call.read(), 15)
                for item in response.items:
                    got.take(item.read)
        assert got.keys == keys(events)
        call.cancel()
    await eventually(lambda: metric("tailrace_delivery_subscribers", transport="grpc") == 0)


async def test_a_call_to_an_unreachable_delivery_is_unavailable(edge: Edge, calls: GrpcStage, stage: Stage) -> None:
    text = (edge.folder / "nginx.conf").read_text().replace(calls.target, f"127.0.0.1:{free_port()}")
    (edge.folder / "nginx.conf").write_text(text)
    edge.stop()
    edge.start()
    await eventually(edge.answers)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.http2}") as channel:
        assert await Client(channel).read(pb.ReadRequest(session="s")).code() is grpc.StatusCode.UNAVAILABLE


async def test_stream_over_http_2_and_tls_resumes_through_the_edge(edge: Edge, broker: Broker) -> None:
    events = story("g1", 40)
    await Log(broker).append(*events[:20])
    trust = ssl.create_default_context()
    edge.authority.configure_trust(trust)
    async with httpx.AsyncClient(verify=trust, http2=True, timeout=15) as http:
        reader = SseClient(http, f"https://127.0.0.1:{edge.tls}/v1/sessions/s/events")
        async with reader.connected() as connection:
            assert connection.response.http_version == "HTTP/2"
            assert await connection.count(15)
        await Log(broker).append(*events[20:])
        await reader.follow(lambda r: len(r.events) >= len(events))
    assert keys(reader.events) == keys(events)


@pytest.mark.browser
async def test_a_page_over_http_2_and_tls_loses_its_network_and_resumes(
    edge: Edge, broker: Broker, stage: Stage, browser: "Browser"
) -> None:
    shown = ".generation:last-child"
    wish = {
        "model": "scripted/story",
        "messages": [{"role": "user", "content": "rivers"}],
        "params": {"tokens": 150, "tokens_per_second": 20},
    }

    def read(script: str) -> Any:
        return browser.driver.execute_script(f"return {script}")

    def look() -> None:
        browser.open(f"https://localhost:{httpx.URL(network.url).port}/?session=s")
        browser.until(lambda: int(browser.text("#received")) > 10)
        assert read("performance.getEntriesByType('navigation')[0].nextHopProtocol") == "h2"
        assert browser.text("#link-state") == "Live"
        network.away = True
        loop.call_soon_threadsafe(network.drop)
        browser.until_text("#link-state", "Lost")
        lost.append(browser.text(f"{shown} .text"))
        network.away = False
        browser.until_text("#link-state", "Live")
        browser.until_text(f"{shown} .badge", "Completed")
        hops = read("performance.getEntriesByType('resource').map((e) => e.nextHopProtocol)")
        assert set(hops) <= {"h2", ""}  # what was lost does not tell

    loop, lost = asyncio.get_running_loop(), list[str]()
    async with producing(broker), splitting(edge.tls, most=4_096) as network:
        asked = await stage.http.post(f"{stage.url}/v1/sessions/s/generations", json=wish)
        await asyncio.to_thread(look)
        kept = (await stage.http.get(f"{stage.url}{asked.json()['links']['generation']}")).json()
        assert (await asyncio.to_thread(browser.text, f"{shown} .text")).strip() == kept["text"].strip()
        assert len(lost[0]) < len(kept["text"])
        assert await asyncio.to_thread(browser.text, "#duplicates") == "0"
        await asyncio.to_thread(browser.open, "about:blank")


async def test_over_a_hundred_streams_share_one_connection_to_the_edge(edge: Edge, broker: Broker) -> None:
    await Log(broker).append(*story("g1"))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.http2}") as channel:
        client = Client(channel)
        calls = [client.read(pb.ReadRequest(session="s")) for _ in range(200)]
        got = await asyncio.gather(*(Read().of(call, 13) for call in calls))
        assert all(one.keys == keys(story("g1")) for one in got)
        for call in calls:
            call.cancel()
