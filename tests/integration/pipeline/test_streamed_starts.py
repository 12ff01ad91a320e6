"""A start whose response is the stream of its own generation."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import aconnect_sse

from schemas.requests import Announcement
from services.delivery.formats.negotiation import negotiate
from services.kit.jetstream.broker import Broker
from services.kit.problem import Problem
from services.producer.adapters.records import Records
from tests.conftest import NatsServer, eventually
from tests.support.credentials import bearer, guarded, token
from tests.support.delivery_server import Stage, delivering, metric
from tests.support.producer_worker import producing

SSE = {"Accept": "text/event-stream"}
BODY = {
    "model": "scripted/story",
    "messages": [{"role": "user", "content": "rivers"}],
    "params": {"tokens": 40, "tokens_per_second": 400},
}


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url) as made, producing(broker):
        yield made


def path(stage: Stage, session: str = "s") -> str:
    return f"{stage.url}/v1/sessions/{session}/generations"


async def asked(
    stage: Stage, body: dict[str, Any] = BODY, *, stop_after: int = 0, **headers: str
) -> tuple[httpx.Response, list[str], list[dict[str, Any]]]:
    """Start with a stream as the response; return the response, the ids and the events."""
    ids, events = [], []
    async with aconnect_sse(stage.http, "POST", path(stage), json=body, headers=SSE | headers) as source:
        async for frame in source.aiter_sse():
            if frame.data and frame.event == "message":
                ids.append(frame.id)
                events.append(json.loads(frame.data))
                if stop_after and len(events) >= stop_after:
                    break
    return source.response, ids, events


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event.get("text", "") for event in events if event["type"] == "delta")


async def test_response_of_a_start_is_the_stream_of_its_generation(stage: Stage) -> None:
    response, ids, events = await asked(stage)
    generation = response.headers["tailrace-generation"]
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["location"] == f"/v1/sessions/s/generations/{generation}"
    assert [events[0]["type"], events[-1]["type"]] == ["started", "completed"]
    assert {event["generation"] for event in events} == {generation}
    assert text_of(events) == (await stage.http.get(f"{path(stage)}/{generation}")).json()["text"]
    again = stage.events(after=response.headers["tailrace-cursor"], generation=generation)
    assert await again.read_all() == 200
    assert (again.ids, again.events) == (ids, events)


async def test_dropped_response_resumes_from_the_event_resource(stage: Stage) -> None:
    body = BODY | {"params": {"tokens": 60, "tokens_per_second": 100}}
    response, ids, events = await asked(stage, body, stop_after=10)
    rest = stage.events(generation=response.headers["tailrace-generation"])
    rest.last_id = ids[-1]
    await rest.follow(lambda client: bool(client.events) and client.events[-1]["type"] == "completed")
    seqs = [event["seq"] for event in [*events, *rest.events]]
    assert seqs == sorted(set(seqs))
    assert seqs[0] == 0


async def test_ndjson_and_granularity_apply_to_the_response(stage: Stage) -> None:
    headers = {"Accept": "application/x-ndjson"}
    answer = await stage.http.post(path(stage) + "?granularity=line", json=BODY, headers=headers)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    events = [line["event"] for line in lines if "event" in line]
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [events[0]["type"], events[-1]["type"]] == ["started", "completed"]
    assert 0 < sum(event["type"] == "delta" for event in events) < 40


async def test_repeated_start_streams_the_same_generation_from_its_beginning(stage: Stage) -> None:
    first, ids, events = await asked(stage, **{"Idempotency-Key": "once"})
    again, later_ids, later = await asked(stage, **{"Idempotency-Key": "once"})
    assert (again.headers["tailrace-generation"], later_ids) == (first.headers["tailrace-generation"], ids)
    assert [event["seq"] for event in later] == [event["seq"] for event in events]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"


async def test_second_answer_of_a_session_shows_nothing_of_the_first(stage: Stage) -> None:
    first, _, _ = await asked(stage)
    second, _, events = await asked(stage)
    assert first.headers["tailrace-generation"] != second.headers["tailrace-generation"]
    assert {event["generation"] for event in events} == {second.headers["tailrace-generation"]}
    assert events[0]["type"] == "started"


async def test_many_starts_at_once_in_one_session_stay_apart(stage: Stage) -> None:
    answers = await asyncio.gather(*(asked(stage) for _ in range(12)))
    for response, _, events in answers:
        assert {event["generation"] for event in events} == {response.headers["tailrace-generation"]}
        assert [events[0]["type"], events[-1]["type"]] == ["started", "completed"]
        assert [event["seq"] for event in events] == list(range(len(events)))


@pytest.mark.parametrize(
    ("body", "query", "status"),
    [
        (BODY | {"model": ""}, "", 400),
        (BODY, "?wait=complete", 400),
        (BODY, "?granularity=word", 400),
        (BODY | {"model": "scripted/nothing-like-it"}, "", 422),
    ],
)
async def test_refused_start_is_a_problem_and_queues_nothing(
    stage: Stage, broker: Broker, body: dict[str, Any], query: str, status: int
) -> None:
    await Records(broker).announce("default", Announcement(models={"scripted": ["story"]}))
    answer = await stage.http.post(path(stage) + query, json=body, headers=SSE)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert await stage.replica.lookups.of_session("default", "s") == []
    assert await broker.count("REQUESTS", "requests.>") == 0


async def test_shape_of_a_stream_without_a_stream_is_refused(stage: Stage) -> None:
    answer = await stage.http.post(path(stage) + "?coalesce=50", json=BODY)
    assert answer.status_code == 400
    assert "text/event-stream" in answer.json()["detail"]


async def test_start_without_the_scope_to_read_queues_nothing(
    broker: Broker, nats_server: NatsServer, tmp_path: Path
) -> None:
    async with guarded(nats_server.url, tmp_path) as stage, producing(broker):
        answer = await stage.http.post(path(stage), json=BODY, headers=SSE | bearer(token("acme", "start")))
        assert answer.status_code == 403
        assert await stage.replica.lookups.of_session("acme", "s") == []
        answer = await stage.http.post(path(stage), json=BODY, headers=SSE | bearer(token("acme", "start", "read")))
        assert (answer.status_code, "event: " in answer.text or "data: " in answer.text) == (200, True)


async def test_client_that_leaves_ends_a_generation_that_wants_a_reader(stage: Stage) -> None:
    body = BODY | {"params": {"tokens": 2_000, "tokens_per_second": 50}, "on_disconnect": {"cancel_after": 0.2}}
    response, _, _ = await asked(stage, body, stop_after=5)
    place = f"{path(stage)}/{response.headers['tailrace-generation']}"

    async def ended() -> bool:
        return (await stage.http.get(place)).json()["state"] == "cancelled"

    await eventually(ended)


async def test_json_stays_the_default_form(stage: Stage) -> None:
    for accept in ({}, {"Accept": "*/*"}, {"Accept": "application/json, text/event-stream;q=0.5"}):
        assert (await stage.http.post(path(stage), json=BODY, headers=accept)).status_code == 202
    assert negotiate("text/event-stream, */*;q=0.1", ["application/json", "text/event-stream"]) == "text/event-stream"


async def test_first_reader_of_a_start_asks_for_no_record(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def asked_for(*_: object) -> None:
        raise AssertionError("the replica has just accepted this generation")

    accepted = (await stage.http.post(path(stage), json=BODY)).json()
    monkeypatch.setattr(stage.replica.lookups, "require", asked_for)
    client = stage.events(generation=accepted["generation"])
    assert await client.read_all() == 200
    assert [client.events[0]["type"], client.events[-1]["type"]] == ["started", "completed"]
    assert metric("tailrace_delivery_subscribers", transport="sse") == 0


async def test_accepted_start_whose_stream_cannot_be_opened_names_its_generation(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> None:
        raise Problem(503, "the log does not answer", headers={"Retry-After": "1"})

    with monkeypatch.context() as patch:
        patch.setattr(stage.replica.streams, "open", away)
        answer = await stage.http.post(path(stage), json=BODY, headers=SSE)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    generation = answer.headers["tailrace-generation"]
    assert answer.headers["location"] == f"/v1/sessions/s/generations/{generation}"
    client = stage.events(generation=generation)
    assert await client.read_all() == 200
    assert client.events[-1]["type"] == "completed"
