"""Clients that cannot stream: batches of events, and whole answers."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from schemas.events import AnyEvent, Delta
from schemas.subjects import presence_subject
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import TENANT, Log, Stage, delivering, keys, metric, story

JSON = {"Accept": "application/json"}
LONG = 20


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url) as running:
        yield running
        await eventually(lambda: waiting() == waiting("complete") == 0)


@pytest.fixture
def log(broker: Broker) -> Log:
    return Log(broker)


def waiting(kind: str = "poll") -> float:
    return metric("tailrace_delivery_subscribers", transport=kind)


def url(stage: Stage) -> str:
    return f"{stage.url}/v1/sessions/s/events"


async def poll(stage: Stage, **query: Any) -> dict[str, Any]:
    response = await stage.http.get(url(stage), params=query, headers=JSON, timeout=LONG + 5)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    found: dict[str, Any] = response.json()
    return found


def events_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [item["event"] for item in batch["events"]]


async def test_poll_returns_stored_events_at_once(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    batch = await poll(stage, wait=LONG)
    assert keys(events_of(batch)) == keys(story("g1"))
    assert batch["cursor"] == batch["events"][-1]["cursor"]
    assert batch["more"] is False
    assert "ended" not in batch


async def test_poll_without_wait_brings_an_empty_batch_when_there_is_nothing(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    first = await poll(stage)
    assert await poll(stage, after=first["cursor"], wait=0) == {"events": [], "cursor": first["cursor"], "more": False}


async def test_poll_waits_for_the_first_event(stage: Stage, log: Log) -> None:
    events = story("g1")
    asked = asyncio.create_task(poll(stage, wait=LONG))
    await eventually(lambda: waiting() == 1)
    await log.append(events[0])
    batch = await asked
    assert keys(events_of(batch)) == keys(events[:1])
    await log.append(*events[1:])
    later = await poll(stage, wait=LONG, after=batch["cursor"])
    assert keys(events_of(later)) == keys(events[1:])


async def test_poll_that_times_out_is_empty_and_keeps_its_cursor(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    cursor = (await poll(stage))["cursor"]
    assert await poll(stage, wait=0.2, after=cursor) == {"events": [], "cursor": cursor, "more": False}


async def test_polls_bring_every_event_once_in_batches_of_any_size(stage: Stage, log: Log) -> None:
    events = story("g1", 40) + story("g2", 40)
    await log.append(*events)
    for limit in (1, 7, 50, 5_000):
        found: list[dict[str, Any]] = []
        query: dict[str, Any] = {"from": "start"}
        while True:
            batch = await poll(stage, limit=limit, **query)
            assert len(batch["events"]) <= limit
            found += events_of(batch)
            query = {"after": batch["cursor"]}
            if not batch["more"]:
                break
        assert keys(found) == keys(events)


@pytest.mark.parametrize("feed_bytes", [65_536])
async def test_polls_read_events_that_are_not_in_memory_from_the_log(
    broker: Broker, nats_server: NatsServer, log: Log, feed_bytes: int
) -> None:
    events = story("g1", 200, size=2_000)
    await log.append(*events)
    async with delivering(nats_server.url, feed_bytes=feed_bytes) as stage:
        found: list[dict[str, Any]] = []
        query: dict[str, Any] = {"from": "start"}
        while not found or found[-1]["type"] != "completed":
            batch = await poll(stage, limit=30, wait=LONG, **query)
            found += events_of(batch)
            query = {"after": batch["cursor"]}
        assert keys(found) == keys(events)


async def test_poll_while_an_answer_is_written_misses_and_repeats_nothing(stage: Stage, log: Log) -> None:
    events = story("g1", 60)
    writing = asyncio.create_task(log.append(*events, pause=0.005))
    found: list[dict[str, Any]] = []
    query: dict[str, Any] = {"from": "start"}
    while not found or found[-1]["type"] != "completed":
        batch = await poll(stage, wait=LONG, **query)
        found += events_of(batch)
        query = {"after": batch["cursor"]}
    await writing
    assert keys(found) == keys(events)


async def test_poll_of_an_ended_generation_is_marked_ended(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"), *story("g2"))
    batch = await poll(stage, generation="g1", wait=LONG)
    assert keys(events_of(batch)) == keys(story("g1"))
    assert (batch["ended"], batch["more"]) == (True, False)
    again = await poll(stage, generation="g1", wait=LONG, after=batch["cursor"])
    assert again == {"events": [], "cursor": batch["cursor"], "more": False, "ended": True}


async def test_batch_in_a_granularity_has_the_same_text_and_exact_cursors(stage: Stage, log: Log) -> None:
    said = ["He", "llo. How", " are", " you? ", "Fi", "ne."]
    middle: list[AnyEvent] = [Delta(generation="g1", seq=n, text=t, tokens=n) for n, t in enumerate(said, 1)]
    await log.append(story("g1")[0], *middle)
    batch = await poll(stage, granularity="sentence")
    texts = [event.get("text") for event in events_of(batch)]
    assert texts == [None, "Hello. ", "How are you? ", "Fine."]
    for number, item in enumerate(batch["events"]):
        rest = await poll(stage, after=item["cursor"])
        assert "".join(e["text"] for e in events_of(rest)) == "".join(t for t in texts[number + 1 :] if t)


async def test_missing_beginning_is_a_gap_in_the_batch(stage: Stage, log: Log, broker: Broker) -> None:
    stored = await log.append(*story("g1"))
    await broker.js.purge_stream("TOKENS_0", seq=stored[4])
    batch = await poll(stage, generation="g1")
    assert batch["gaps"] == [{"reason": "beginning_expired", "generation": "g1"}]
    assert keys(events_of(batch)) == keys(story("g1")[4:])


async def test_poll_during_a_drain_is_answered(stage: Stage, log: Log) -> None:
    asked = asyncio.create_task(poll(stage, wait=LONG))
    await eventually(lambda: waiting() == 1)
    await stage.replica.drain(5)
    assert (await asked)["events"] == []


async def test_disconnect_during_a_poll_is_noticed(stage: Stage) -> None:
    asked = asyncio.create_task(poll(stage, wait=LONG))
    await eventually(lambda: waiting() == 1)
    asked.cancel()
    await eventually(lambda: waiting() == 0)


@pytest.mark.parametrize(
    "query",
    [
        {"wait": "soon"},
        {"wait": "-1"},
        {"wait": "nan"},
        {"wait": "complete"},
        {"wait": "1", "limit": "0"},
        {"wait": "1", "limit": "5001"},
        {"wait": "1", "limit": "x"},
    ],
)
async def test_invalid_poll_parameters_are_refused(stage: Stage, query: dict[str, str]) -> None:
    response = await stage.http.get(url(stage), params=query, headers=JSON)
    assert response.status_code == 400


async def test_poll_is_no_stream(stage: Stage) -> None:
    response = await stage.http.get(url(stage), params={"wait": 1}, headers={"Accept": "text/event-stream"})
    assert response.status_code == 406


ASK = {"model": "m", "messages": [{"role": "user", "content": "?"}]}


async def write(log: Log, generation: str) -> list[AnyEvent]:
    events = story(generation)
    await log.append(*events)
    return events


def text_of(generation: str) -> str:
    return "".join(f"{generation}:{n} " for n in range(1, 11))


async def test_wait_complete_returns_when_the_generation_ends(stage: Stage, log: Log) -> None:
    events = story("g1")
    await log.append(*events[:5])
    places = [f"{stage.url}/v1/sessions/s/generations/g1", f"{url(stage)}?generation=g1"]
    asked = [
        asyncio.create_task(stage.http.get(p, params={"wait": "complete"} | dict(httpx.URL(p).params), headers=JSON))
        for p in places
    ]
    await eventually(lambda: waiting("complete") == 2)
    await log.append(*events[5:])
    for task in asked:
        response = await task
        assert response.status_code == 200
        view = response.json()
        assert (view["state"], view["text"]) == ("completed", text_of("g1"))
        assert view["usage"]["output"] == 10


async def test_wait_complete_of_an_ended_generation_returns_at_once(stage: Stage, log: Log) -> None:
    await write(log, "g1")
    response = await stage.http.get(f"{stage.url}/v1/sessions/s/generations/g1", params={"wait": "complete"})
    assert (response.status_code, response.json()["state"]) == (200, "completed")


async def test_a_start_can_wait_for_the_complete_answer(stage: Stage, log: Log) -> None:
    path = f"{stage.url}/v1/sessions/s/generations"
    asked = asyncio.create_task(stage.http.post(path, params={"wait": "complete"}, json=ASK))
    await eventually(lambda: waiting("complete") == 1)
    (record,) = (await stage.http.get(f"{stage.url}/v1/sessions/s")).json()["generations"]
    await write(log, record["generation"])
    response = await asked
    assert response.status_code == 200
    assert response.json()["text"] == text_of(record["generation"])
    assert response.headers["location"] == f"/v1/sessions/s/generations/{record['generation']}"


async def test_answer_not_complete_within_the_wait_is_202_with_the_text_so_far(
    broker: Broker, nats_server: NatsServer, log: Log
) -> None:
    await log.append(*story("g1")[:5])
    async with delivering(nats_server.url, wait=0.3) as stage:
        response = await stage.http.get(f"{stage.url}/v1/sessions/s/generations/g1", params={"wait": "complete"})
        assert response.status_code == 202
        assert (response.json()["state"], response.json()["text"]) == ("running", "g1:1 g1:2 g1:3 g1:4 ")
        asked = await stage.http.post(f"{stage.url}/v1/sessions/s/generations", params={"wait": "complete"}, json=ASK)
        assert (asked.status_code, asked.json()["state"]) == (202, "queued")


async def test_whole_answer_of_an_unknown_generation_is_404(stage: Stage) -> None:
    response = await stage.http.get(f"{stage.url}/v1/sessions/s/generations/nope", params={"wait": "complete"})
    assert response.status_code == 404
    response = await stage.http.get(f"{stage.url}/v1/sessions/s/generations/nope", params={"wait": "later"})
    assert response.status_code == 400


async def is_present(broker: Broker, generation: str) -> bool:
    return await broker.request(presence_subject(TENANT, "s", generation), b"") is not None


@pytest.mark.parametrize("form", ["poll", "complete"])
async def test_a_waiting_request_counts_as_present_until_it_disconnects(
    stage: Stage, log: Log, broker: Broker, form: str
) -> None:
    await log.append(*story("g1")[:3])
    cursor = (await poll(stage, generation="g1"))["cursor"]
    assert not await is_present(broker, "g1")
    query = {"wait": LONG, "after": cursor} if form == "poll" else {"wait": "complete"}
    asked = asyncio.create_task(poll(stage, generation="g1", **query))
    await eventually(lambda: is_present(broker, "g1"))
    asked.cancel()
    await eventually(lambda: waiting(form) == 0)
    assert not await is_present(broker, "g1")


async def test_whole_answer_is_json_and_nothing_else(stage: Stage, log: Log) -> None:
    await write(log, "g1")
    response = await stage.http.post(url(stage), json={"generation": "g1", "wait": "complete"})
    assert json.loads(response.content)["state"] == "completed"
