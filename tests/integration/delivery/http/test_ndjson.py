"""A session's events as lines of JSON, and asked for by POST."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, Stage, delivering, keys, story, subscribers

NDJSON = {"Accept": "application/x-ndjson"}


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url, heartbeat=1.0) as running:
        yield running


@pytest.fixture
def log(broker: Broker) -> Log:
    return Log(broker)


def url(stage: Stage, session: str = "s") -> str:
    return f"{stage.url}/v1/sessions/{session}/events"


def read(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


async def test_lines_are_cursor_and_stored_event(stage: Stage, log: Log) -> None:
    events = story("g1")
    await log.append(*events)
    sse = stage.events(generation="g1")
    await sse.read_all()
    response = await stage.http.get(url(stage), params={"generation": "g1"}, headers=NDJSON)
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.headers["cache-control"] == "no-store"
    lines = read(response.text)
    assert [line["cursor"] for line in lines] == sse.ids
    assert [line["event"] for line in lines] == sse.events


async def test_lines_resume_at_every_cursor(stage: Stage, log: Log) -> None:
    events = story("g1")
    await log.append(*events)
    whole = read((await stage.http.get(url(stage), params={"generation": "g1"}, headers=NDJSON)).text)
    for position, line in enumerate(whole[:-1], 1):
        query = {"generation": "g1", "after": line["cursor"]}
        assert read((await stage.http.get(url(stage), params=query, headers=NDJSON)).text) == whole[position:]
    query = {"generation": "g1", "after": whole[-1]["cursor"]}
    assert (await stage.http.get(url(stage), params=query, headers=NDJSON)).status_code == 204


async def test_each_event_is_one_line_at_once_and_heartbeats_fill_silence(stage: Stage, log: Log) -> None:
    events = story("g1")
    async with stage.http.stream("GET", url(stage), headers=NDJSON) as response:
        lines = response.aiter_lines()
        for event in events[:3]:
            await log.append(event)
            line = json.loads(await anext(lines))
            while line == {"type": "heartbeat"}:
                line = json.loads(await anext(lines))
            assert keys([line["event"]]) == keys([event])
        assert json.loads(await anext(lines)) == {"type": "heartbeat"}
    await eventually(lambda: subscribers() == 0)


async def test_stream_that_ends_early_sends_bye_with_a_cursor(stage: Stage, log: Log) -> None:
    await log.append(*story("g1")[:3])
    async with stage.http.stream("GET", url(stage), headers=NDJSON) as response:
        lines = response.aiter_lines()
        events = [json.loads(await anext(lines)) for _ in range(3)]
        drained = asyncio.create_task(stage.replica.drain(5))
        bye = json.loads(await anext(lines))
        await drained
    assert bye == {"type": "bye", "reason": "drain", "cursor": events[-1]["cursor"]}


async def test_missing_beginning_is_a_gap_line(stage: Stage, log: Log, broker: Broker) -> None:
    stored = await log.append(*story("g1"))
    await broker.js.purge_stream("TOKENS_0", seq=stored[4])
    lines = read((await stage.http.get(url(stage), params={"generation": "g1"}, headers=NDJSON)).text)
    assert lines[0] == {"type": "gap", "reason": "beginning_expired", "generation": "g1"}
    assert keys(line["event"] for line in lines[1:]) == keys(story("g1")[4:])


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("*/*", "text/event-stream; charset=utf-8"),
        ("text/event-stream", "text/event-stream; charset=utf-8"),
        ("application/x-ndjson", "application/x-ndjson"),
        ("application/ndjson", "application/ndjson"),
        ("text/event-stream;q=0.4, application/x-ndjson;q=0.5", "application/x-ndjson"),
        ("application/json", "application/json"),
    ],
)
async def test_one_resource_has_several_media_types(stage: Stage, log: Log, accept: str, content_type: str) -> None:
    await log.append(*story("g1"))
    response = await stage.http.get(url(stage), params={"generation": "g1"}, headers={"Accept": accept})
    assert response.headers["content-type"] == content_type


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_unsupported_media_type_is_406_with_the_supported_types(stage: Stage, method: str) -> None:
    response = await stage.http.request(method, url(stage), headers={"Accept": "text/html"})
    assert response.status_code == 406
    assert response.headers["content-type"] == "application/problem+json"
    assert "application/x-ndjson" in response.json()["detail"]


async def test_post_reads_the_same_options_from_its_body(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"), *story("g2"))
    got = await stage.http.get(url(stage), params={"generation": "g1"})
    posted = await stage.http.post(url(stage), json={"generation": "g1"})
    assert posted.status_code == 200
    assert posted.text == got.text
    cursor = read((await stage.http.get(url(stage), params={"generation": "g1"}, headers=NDJSON)).text)[4]["cursor"]
    rest = await stage.http.post(url(stage), json={"generation": "g1", "after": cursor}, headers=NDJSON)
    assert keys(line["event"] for line in read(rest.text)) == keys(story("g1")[5:])


async def test_post_without_a_body_uses_the_defaults(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with stage.http.stream("POST", url(stage), headers=NDJSON) as response:
        lines = response.aiter_lines()
        assert keys([json.loads(await anext(lines))["event"] for _ in story("g1")]) == keys(story("g1"))
    await eventually(lambda: subscribers() == 0)


async def test_disconnect_from_a_posted_stream_is_noticed(stage: Stage, log: Log) -> None:
    async with stage.http.stream("POST", url(stage), json={"from": "live"}):
        await eventually(lambda: subscribers() == 1)
    await eventually(lambda: subscribers() == 0)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"since": 1}',
        b'{"after": 1}',
        b'{"after": "nonsense"}',
        b'{"from": "middle"}',
        b'{"sessions": ["a"]}',
        b'{"granularity": "word"}',
        b'{"granularity": "line", "coalesce": 100}',
        b'{"coalesce": "100"}',
        b'{"wait": "soon"}',
        b'{"wait": -1}',
        b'{"wait": "complete"}',
        b'{"wait": 0, "limit": 0}',
        b"\xff",
        b"[" * 10_000,
    ],
)
async def test_invalid_bodies_are_refused(stage: Stage, log: Log, body: bytes) -> None:
    response = await stage.http.post(url(stage), content=body)
    assert response.status_code == 400, response.text
    assert response.headers["content-type"] == "application/problem+json"
