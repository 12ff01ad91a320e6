"""HTTP/2 for all of HTTP: by prior knowledge and by ALPN, with streams that neither wait for nor end each other."""

import asyncio
import json
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import httpx
import pytest
import trustme

from bench.processes import free_port
from services.kit.http import serving
from services.kit.jetstream.broker import Broker
from services.kit.tls import ServerTls, TlsUnusable, server_tls
from tests.conftest import NatsServer, require
from tests.support.delivery_server import Log, Stage, delivering, keys, story, subscribers
from tests.support.sse_client import SseClient


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url) as running:
        yield running
        await running.settled()


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A client that speaks HTTP/2 alone, without TLS."""
    async with httpx.AsyncClient(http1=False, http2=True, timeout=15) as client:
        yield client


@pytest.fixture
def log(broker: Broker) -> Log:
    return Log(broker)


class RawClient:
    """An HTTP/2 connection whose flow-control windows are opened by the test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int) -> None:
        self._reader, self._writer = reader, writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        wanted = {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window, h2.settings.SettingCodes.ENABLE_PUSH: 0}
        self.h2.local_settings = h2.settings.Settings(client=True, initial_values=wanted)
        self.bodies: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.refused: dict[int, int] = {}
        self.goaway = False

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str, window: int = 65_535) -> AsyncIterator["RawClient"]:
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        client = cls(reader, writer, window)
        client.h2.initiate_connection()
        client.h2.increment_flow_control_window(2**24)
        client.send()
        try:
            yield client
        finally:
            writer.close()

    def send(self) -> None:
        self._writer.write(self.h2.data_to_send())

    def get(self, path: str) -> int:
        stream = self.h2.get_next_available_stream_id()
        headers = [(":method", "GET"), (":path", path), (":scheme", "http"), (":authority", "127.0.0.1")]
        self.h2.send_headers(stream, headers, end_stream=True)
        self.bodies[stream] = b""
        self.send()
        return stream

    def grant(self, stream: int, size: int) -> None:
        self.h2.increment_flow_control_window(size, stream)
        self.send()

    async def until(self, enough: Any) -> None:
        async with asyncio.timeout(20):
            while not enough():
                data = await self._reader.read(65_536)
                assert data, "the server closed the connection"
                for event in self.h2.receive_data(data):
                    self._take(event)
                self.send()

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.DataReceived():
                assert event.stream_id is not None
                self.bodies[event.stream_id] += event.data or b""
            case h2.events.StreamEnded():
                assert event.stream_id is not None
                self.ended.add(event.stream_id)
            case h2.events.StreamReset():
                assert event.stream_id is not None
                self.refused[event.stream_id] = int(event.error_code or 0)
            case h2.events.ConnectionTerminated():
                self.goaway = True


def events_of(body: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: {") and b'"seq"' in line]


async def test_events_over_http_2_equal_those_over_http_1_and_resume(
    stage: Stage, log: Log, http: httpx.AsyncClient
) -> None:
    events = story("g1", 50)
    await log.append(*events)
    reader = SseClient(http, f"{stage.url}/v1/sessions/s/events", generation="g1")
    async with reader.connected() as connection:
        assert connection.response.http_version == "HTTP/2"
        assert await connection.count(20)
    seen = len(reader.events)
    async with reader.connected() as connection:
        await connection.to_the_end()
    assert keys(reader.events) == keys(events)
    assert seen <= len(reader.events)
    plain = stage.events(generation="g1")
    await plain.read_all()
    assert plain.events == reader.events
    assert plain.ids == reader.ids


async def test_five_hundred_streams_share_one_connection(stage: Stage, broker: Broker) -> None:
    events = story("g1", 3)
    for session in ("a", "b", "c"):
        await Log(broker, session).append(*events[:4])
    async with RawClient.connect(stage.url) as raw:
        await raw.until(lambda: raw.h2.remote_settings.max_concurrent_streams == 1_024)
        streams = [raw.get(f"/v1/sessions/{'abc'[n % 3]}/events") for n in range(500)]
        await raw.until(lambda: all(len(events_of(raw.bodies[s])) == 4 for s in streams))
        assert subscribers() == 500
        for session in ("a", "b", "c"):
            await Log(broker, session).append(*events[4:])
        await raw.until(lambda: all(len(events_of(raw.bodies[s])) == len(events) for s in streams))
        assert all(keys(events_of(raw.bodies[s])) == keys(events) for s in streams)


async def test_streams_beyond_the_bound_of_a_connection_are_refused_alone(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with RawClient.connect(stage.url) as raw:
        await raw.until(lambda: raw.h2.remote_settings.max_concurrent_streams == 1_024)
        raw.h2.remote_settings.max_concurrent_streams = 10_000  # a client that does not care
        raw.h2.remote_settings.acknowledge()
        streams = [raw.get("/v1/sessions/idle/events") for _ in range(1_030)]
        await raw.until(lambda: len(raw.refused) >= 6)
        refused = next(iter(raw.refused.values()))
        assert refused == h2.errors.ErrorCodes.REFUSED_STREAM
        assert set(raw.refused) <= set(streams)
        raw.h2.reset_stream(streams[0])
        raw.send()
        last = raw.get("/v1/sessions/s/events?generation=g1")
        await raw.until(lambda: last in raw.ended or last in raw.refused)


async def test_unread_stream_does_not_block_others_on_its_connection(stage: Stage, log: Log) -> None:
    large, small = story("g1", 200, size=10_000), story("g2", 5)
    await log.append(*large)
    await Log(log._broker, "other").append(*small)
    async with RawClient.connect(stage.url, window=20_000) as raw:
        stuck = raw.get("/v1/sessions/s/events?generation=g1")
        await raw.until(lambda: len(raw.bodies[stuck]) == 20_000)
        for _ in range(5):
            fine = raw.get("/v1/sessions/other/events?generation=g2")
            await raw.until(lambda fine=fine: fine in raw.ended)
            assert keys(events_of(raw.bodies[fine])) == keys(small)
        assert len(raw.bodies[stuck]) == 20_000
        raw.grant(stuck, 2**24)
        await raw.until(lambda: stuck in raw.ended)
        assert keys(events_of(raw.bodies[stuck])) == keys(large)


async def test_drain_ends_every_stream_of_a_connection_in_order(broker: Broker, nats_server: NatsServer) -> None:
    async with delivering(nats_server.url) as stage, RawClient.connect(stage.url) as raw:
        streams = [raw.get("/v1/sessions/s/events") for _ in range(50)]
        await raw.until(lambda: all(b"retry" in raw.bodies[s] for s in streams))
        draining = asyncio.create_task(stage.replica.drain(5))
        await raw.until(lambda: raw.ended >= set(streams))
        await draining
        assert not raw.refused
        assert all(b"event: bye" in raw.bodies[s] for s in streams)


async def test_curl_speaks_http_2_by_prior_knowledge(stage: Stage, log: Log) -> None:
    require(shutil.which("curl"), "curl is not installed")
    await log.append(*story("g1"))
    written = "%{stderr}%{http_version} %{http_code}"
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sSN", "--max-time", "20", "--http2-prior-knowledge", "-w", written),
        f"{stage.url}/v1/sessions/s/events?generation=g1",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    body, said = await process.communicate()
    assert (process.returncode, said) == (0, b"2 200")
    assert keys(events_of(body)) == keys(story("g1"))


async def test_header_block_that_is_too_large_is_refused(stage: Stage, http: httpx.AsyncClient) -> None:
    headers = {f"x-{n}": "y" * 4_000 for n in range(30)}
    try:
        answer = await http.get(f"{stage.url}/healthz", headers=headers)
    except httpx.RemoteProtocolError:
        return
    assert answer.status_code == 431


# TLS


@pytest.fixture
def files(tmp_path: Path) -> tuple[trustme.CA, ServerTls]:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    tls = server_tls(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    assert tls is not None
    return authority, tls


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["http_version"].encode() + scope["scheme"].encode()})


@pytest.mark.parametrize(("http2", "version"), [(True, "HTTP/2"), (False, "HTTP/1.1")])
async def test_tls_agrees_on_the_newest_version_that_both_speak(
    files: tuple[trustme.CA, ServerTls], http2: bool, version: str
) -> None:
    authority, tls = files
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    port = free_port()
    async with (
        serving(hello, "127.0.0.1", port, grace=lambda: 2, tls=tls),
        httpx.AsyncClient(verify=trust, http2=http2, timeout=15) as client,
    ):
        answer = await client.get(f"https://127.0.0.1:{port}/")
        assert (answer.http_version, answer.text[-5:]) == (version, "https")
        with pytest.raises(httpx.HTTPError):
            await client.get(f"http://127.0.0.1:{port}/")
        with pytest.raises(httpx.ConnectError):
            async with httpx.AsyncClient(timeout=15) as stranger:
                await stranger.get(f"https://127.0.0.1:{port}/")


def test_one_file_without_the_other_is_refused(files: tuple[trustme.CA, ServerTls], tmp_path: Path) -> None:
    _, tls = files
    with pytest.raises(TlsUnusable, match="TLS_KEY: must be set"):
        server_tls(str(tls.certificate), None)
    with pytest.raises(TlsUnusable, match="TLS_CERT: must be set"):
        server_tls(None, str(tls.key))
    with pytest.raises(TlsUnusable, match="cannot use"):
        server_tls(str(tls.key), str(tls.certificate))
    assert server_tls(None, None) is None
