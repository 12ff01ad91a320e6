"""Serving on a real port, probes, and the exit codes of a service."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import uvloop
from litestar import Litestar, Request, post

from bench.processes import free_port
from services.kit.http import HEAD_BYTES, PortTaken, probes, serving
from tests.conftest import eventually


async def passing() -> bool:
    return True


async def failing() -> bool:
    return False


async def raising() -> bool:
    raise ConnectionError("no database")


def app(**checks: Any) -> Litestar:
    return Litestar([probes(checks)])


async def test_an_application_answers_while_the_block_runs_and_the_port_is_free_after_it() -> None:
    port = free_port()
    async with serving(app(), "127.0.0.1", port), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    async with serving(app(), "127.0.0.1", port):
        pass


async def test_a_port_in_use_raises_port_taken_with_host_and_port() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PortTaken, match=f"cannot listen on 127.0.0.1:{port}: ") as caught:
            async with serving(app(), "127.0.0.1", port):
                pytest.fail("must not be reached")
    assert (caught.value.host, caught.value.port) == ("127.0.0.1", port)


async def test_two_services_cannot_share_a_port() -> None:
    port = free_port()
    async with serving(app(), "127.0.0.1", port):
        with pytest.raises(PortTaken):
            async with serving(app(), "127.0.0.1", port):
                pytest.fail("must not be reached")


async def test_an_error_in_the_block_ends_the_server() -> None:
    port = free_port()
    with pytest.raises(KeyError):
        async with serving(app(), "127.0.0.1", port):
            raise KeyError("x")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


@pytest.mark.parametrize(
    ("checks", "status", "results"),
    [
        ({}, 200, {}),
        ({"broker": passing}, 200, {"broker": True}),
        ({"broker": passing, "database": failing}, 503, {"broker": True, "database": False}),
        ({"database": raising}, 503, {"database": False}),
    ],
)
async def test_ready_requires_every_check_to_pass(checks: Any, status: int, results: dict[str, bool]) -> None:
    port = free_port()
    async with serving(app(**checks), "127.0.0.1", port), httpx.AsyncClient() as client:
        response = await client.get(f"http://127.0.0.1:{port}/readyz")
    assert response.status_code == status
    assert response.json()["checks"] == results


async def test_metrics_are_prometheus_text() -> None:
    port = free_port()
    async with serving(app(), "127.0.0.1", port), httpx.AsyncClient() as client:
        response = await client.get(f"http://127.0.0.1:{port}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "# TYPE process_cpu_seconds_total counter" in response.text


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_cleartext_http2_is_answered_from_its_first_frame_on(run: Callable[[Any], None]) -> None:
    async def dial() -> None:
        port = free_port()
        async with serving(app(), "127.0.0.1", port):
            for _ in range(30):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
                async with asyncio.timeout(10):
                    header = await reader.readexactly(9)
                writer.close()
                assert (header[3], header[4]) == (0x04, 0), "SETTINGS, and not yet the acknowledgement of the client's"

    run(dial())


SERVICE = """
import asyncio
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.http import PortTaken
from services.kit.lifecycle import run_service
from services.kit.settings import SettingsError

async def main(stop):
    {body}

run_service(main)
"""


def start(body: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SERVICE.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("pass", 0, ""),
        ('raise SettingsError(["TAILRACE_X: no such setting"])', 2, "TAILRACE_X: no such setting"),
        ('raise PortTaken("127.0.0.1", 80, "permission denied")', 2, "cannot listen on 127.0.0.1:80"),
        ('raise BrokerUnavailable("no NATS server answers")', 3, "no NATS server answers"),
        ('raise ExceptionGroup("x", [BrokerUnavailable("deep inside")])', 3, "deep inside"),
    ],
)
def test_a_service_exits_with_the_code_of_its_error_and_one_line_of_text(body: str, code: int, said: str) -> None:
    _out, errors = (process := start(body)).communicate(timeout=60)
    assert process.returncode == code
    assert said in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_service_gracefully_with_code_0(signum: signal.Signals) -> None:
    process = start('print("up", flush=True); await stop.wait(); print("down", flush=True)')
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == "up\n"
    process.send_signal(signum)
    await eventually(lambda: process.poll() is not None, timeout=30)
    out, errors = process.communicate()
    assert (process.returncode, out, errors) == (0, "down\n", "")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_service_that_still_starts(signum: signal.Signals) -> None:
    body = """
    try:
        print("starts", flush=True)
        await asyncio.sleep(600)
    finally:
        print("tidies up", flush=True)
    await stop.wait()"""
    process = start(body)
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == "starts\n"
    process.send_signal(signum)
    await eventually(lambda: process.poll() is not None, timeout=30)
    out, errors = process.communicate()
    assert (process.returncode, out, errors) == (0, "tidies up\n", "")


@post("/size")
async def size(request: Request[Any, Any, Any]) -> int:
    return len(await request.body())


async def test_the_head_of_a_request_is_bounded_and_bodies_are_not() -> None:
    port, measuring = free_port(), Litestar([size])
    async with serving(measuring, "127.0.0.1", port), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for body in (b"x" * 1_000_000, _pieces(b"x" * 50_000, 20)):
            answer = await client.post("/size", content=body, headers={"X-Long": "x" * (HEAD_BYTES - 1_000)})
            assert (answer.status_code, answer.json()) == (201, 1_000_000)
        assert (await client.post("/size", headers={"X-Long": "x" * HEAD_BYTES})).status_code == 431
        assert (await client.post("/size", params={"long": "x" * HEAD_BYTES})).status_code == 431


async def _pieces(piece: bytes, count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield piece
