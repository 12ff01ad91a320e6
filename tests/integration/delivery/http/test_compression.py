"""Streams in gzip: each client's stream is whole, though the blocks are shared."""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.delivery.formats.gzip import Gzipped, takes_gzip
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, Stage, delivering, keys, metric, story, subscribers

GZIP = {"Accept-Encoding": "gzip"}


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url, compress=True, heartbeat=1.0) as running:
        yield running


@pytest.fixture
def log(broker: Broker) -> Log:
    return Log(broker)


async def raw(stage: Stage, headers: dict[str, str], **query: str) -> tuple[str | None, bytes]:
    """Return the answer's encoding and its body as it came."""
    url = f"{stage.url}/v1/sessions/s/events"
    async with stage.http.stream("GET", url, params=query, headers=headers) as response:
        body = b"".join([piece async for piece in response.aiter_raw()])
        return response.headers.get("content-encoding"), body


def unpacked(body: bytes) -> bytes:
    """Return the content of a gzip stream, which must end with a valid checksum."""
    packer = zlib.decompressobj(31)
    plain = packer.decompress(body)
    assert packer.eof
    assert packer.unused_data == b""
    return plain


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
async def test_compressed_stream_is_the_plain_one(stage: Stage, log: Log, accept: str) -> None:
    await log.append(*story("g1", 200))
    encoding, plain = await raw(stage, {"Accept": accept, "Accept-Encoding": "identity"}, generation="g1")
    assert encoding is None
    encoding, packed = await raw(stage, {"Accept": accept} | GZIP, generation="g1")
    assert encoding == "gzip"
    assert unpacked(packed) == plain
    assert len(packed) < len(plain) / 4


async def test_clients_at_different_positions_share_blocks_and_receive_complete_streams(
    stage: Stage, log: Log, monkeypatch: Any
) -> None:
    events = story("g1", 30)
    await log.append(*events[:5])
    made: list[int] = []
    original = Gzipped.message

    def counting(self: Gzipped, frames: Any, *, ends: bool) -> Any:
        made.append(len(frames))
        return original(self, frames, ends=ends)

    starts = ["start", "live"] * 10
    ndjson = {"Accept": "application/x-ndjson"} | GZIP
    reading = [asyncio.create_task(raw(stage, ndjson, generation="g1", **{"from": f})) for f in starts]
    await eventually(lambda: metric("tailrace_delivery_subscribers", transport="ndjson") == len(starts))
    monkeypatch.setattr(Gzipped, "message", counting)
    await log.append(*events[5:])
    for start, (_, body) in zip(starts, await asyncio.gather(*reading), strict=True):
        lines = [json.loads(line) for line in unpacked(body).splitlines()]
        found = [line["event"] for line in lines if "event" in line]
        assert keys(found) == keys(events[5:] if start == "live" else events)
    assert sum(made) == len(events) - 5


async def test_gzip_is_flushed_after_every_event(stage: Stage, log: Log) -> None:
    client = stage.events(**{"from": "start"})
    async with client.connected(**GZIP) as connection:
        assert connection.response.headers["content-encoding"] == "gzip"
        for number, event in enumerate(story("g1"), 1):
            await log.append(event)
            assert await connection.count(number)
    assert keys(client.events) == keys(story("g1"))


async def test_bye_ends_a_compressed_stream_completely(stage: Stage, log: Log) -> None:
    await log.append(*story("g1")[:3])
    reading = asyncio.create_task(raw(stage, GZIP))
    await eventually(lambda: subscribers() == 1)
    await stage.replica.drain(5)
    assert b"event: bye" in unpacked((await reading)[1])


async def test_batches_are_compressed_when_they_are_large(stage: Stage, log: Log) -> None:
    events = story("g1", 200)
    await log.append(*events)
    encoding, packed = await raw(stage, {"Accept": "application/json"} | GZIP, generation="g1")
    assert encoding == "gzip"
    assert keys(item["event"] for item in json.loads(unpacked(packed))["events"]) == keys(events)
    encoding, small = await raw(stage, {"Accept": "application/json"} | GZIP, generation="g1", limit="1")
    assert encoding is None
    assert len(json.loads(small)["events"]) == 1


async def test_no_response_is_compressed_without_accept_encoding(
    broker: Broker, nats_server: NatsServer, log: Log
) -> None:
    await log.append(*story("g1"))
    async with delivering(nats_server.url) as stage:
        assert (await raw(stage, GZIP, generation="g1"))[0] is None


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        (None, False),
        ("", False),
        ("gzip", True),
        ("br, gzip;q=0.5", True),
        ("*", True),
        ("gzip;q=0", False),
        ("br", False),
    ],
)
def test_accept_encoding_decides_on_gzip(header: str | None, taken: bool) -> None:
    assert takes_gzip(header or None) is taken
