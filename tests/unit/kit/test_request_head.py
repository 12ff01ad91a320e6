"""Test request heads without a host or with several, over HTTP/1.1 and HTTP/2."""

import asyncio
from typing import Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ResponseReceived

from bench.processes import free_port
from services.kit.http import serving
from services.kit.request_head import wrong_coding, wrong_host


@pytest.mark.parametrize(
    ("version", "hosts", "status"),
    [
        ("1.1", [b"x"], None),
        ("1.1", [b""], None),
        ("1.1", [], 400),
        ("1.1", [b"x", b"x"], 400),
        ("1.0", [], None),
        ("1.0", [b"x", b"y"], 400),
        ("2", [b"x"], None),
        ("2", [b""], 400),
        ("2", [], 400),
        ("2", [b"x", b"y"], 400),
    ],
)
def test_a_request_names_one_host(version: str, hosts: list[bytes], status: int | None) -> None:
    refusal = wrong_host([(b"accept", b"*/*"), *((b"host", host) for host in hosts)], version)
    assert (refusal.status if refusal else None) == status


@pytest.mark.parametrize(
    ("codings", "status"), [([], None), ([b"chunked"], None), ([b"Chunked"], None), ([b"gzip, chunked"], 501)]
)
def test_chunked_is_the_only_accepted_transfer_coding(codings: list[bytes], status: int | None) -> None:
    refusal = wrong_coding([(b"transfer-encoding", coding) for coding in codings])
    assert (refusal.status if refusal else None) == status


@pytest.mark.parametrize(
    ("names", "status"),
    [
        ([(":authority", "x")], 200),
        ([("host", "x")], 200),
        ([], 400),
        ([("host", "x"), ("host", "y")], 400),
    ],
)
async def test_a_request_over_http_2_names_one_host(names: list[tuple[str, str]], status: int) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    port = free_port()
    async with serving(app, "127.0.0.1", port, grace=lambda: 1.0):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        connection = H2Connection(H2Configuration(validate_outbound_headers=False))
        connection.initiate_connection()
        connection.send_headers(1, [(":method", "GET"), (":scheme", "http"), (":path", "/"), *names], end_stream=True)
        answered: list[int] = []
        async with asyncio.timeout(20):
            while not answered:
                writer.write(connection.data_to_send())
                for event in connection.receive_data(await reader.read(65_536)):
                    if isinstance(event, ResponseReceived):
                        answered.append(int(dict(event.headers)[b":status"]))
        writer.close()
    assert answered == [status]
