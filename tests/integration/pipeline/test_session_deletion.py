"""Test the deletion of a session: events, records and dead events are removed, bills stay, readers get a gap."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from schemas.requests import GenerationRecord, Request
from schemas.subjects import dead_subject, lane_of
from schemas.topology import CONSUMERS, DEAD, Topology
from services.delivery.requests import deletion as deleting
from services.delivery.requests.generations import Lookups
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from tests.conftest import eventually
from tests.support.billing_process import running, sqlite
from tests.support.consumer_server import Service
from tests.support.delivery_server import TENANT, Log, Stage, delivering, keys, story
from tests.support.producer_worker import producing

STREAM = "TOKENS_0"
OLD = 1_000.0  # a record's age: no start that is still under way


@pytest.fixture
async def stage(nats_url: str) -> AsyncIterator[Stage]:
    async with delivering(nats_url) as running_stage:
        yield running_stage


@pytest.fixture
async def log(broker: Broker, stage: Stage) -> Log:
    return Log(broker)


@asynccontextmanager
async def billed(broker: Broker, folder: Path) -> AsyncIterator[Any]:
    async with running(broker, sqlite(folder)) as run:
        yield run


def lookups(stage: Stage) -> Lookups:
    return Lookups(stage.broker, stage.replica.clock, stage.replica.states.partition)


async def answered(stage: Stage, log: Log, generation: str, deltas: int = 3, session: str = "s") -> None:
    """An answer that has ended, with its record."""
    await log.append(*story(generation, deltas))
    record = GenerationRecord(
        tenant=TENANT, session=session, generation=generation, state="completed", model="m", created_at=OLD
    )
    assert await lookups(stage).create(record)


async def delete(stage: Stage, session: str = "s", **query: str) -> httpx.Response:
    return await stage.http.delete(f"{stage.url}/v1/sessions/{session}", params=query)


async def subjects(broker: Broker) -> set[str]:
    return {m.subject async for batch in broker.read(STREAM, "tokens.>") for m in batch}


async def test_a_deleted_session_is_gone_and_its_bills_stay(
    stage: Stage, broker: Broker, log: Log, tmp_path: Path
) -> None:
    async with billed(broker, tmp_path) as run:
        await answered(stage, log, "g1")
        await answered(stage, log, "g2")
        other = Log(broker, "other")
        await answered(stage, other, "g1", session="other")
        assert (await delete(stage)).status_code == 204
        assert await subjects(broker) == {other.subject("g1")}
        for path in ("/v1/sessions/s", "/v1/sessions/s/generations/g1", "/v1/sessions/s/events"):
            answer = await stage.http.get(stage.url + path)
            assert (answer.status_code, answer.json()["type"].rpartition(":")[2]) == (410, "session-deleted"), path
        cancelled = await stage.http.post(f"{stage.url}/v1/sessions/s/generations/g1/cancel")
        assert cancelled.status_code == 410
        listed = (await stage.http.get(f"{stage.url}/v1/sessions")).json()["sessions"]
        assert [session["session"] for session in listed] == ["other"]
        for name in ("g1", "g2"):
            g = await run.reports.generation(TENANT, name)
            assert g is not None
            assert (g.state, g.output) == ("completed", 3)


async def test_deletion_is_idempotent_and_an_unknown_session_is_404(stage: Stage, log: Log) -> None:
    assert (await delete(stage, "never")).status_code == 404
    await answered(stage, log, "g1")
    await _nobody_bills(stage)
    assert [(await delete(stage)).status_code for _ in range(2)] == [204, 204]
    await log.append(*story("g2", 1))
    assert (await delete(stage)).status_code == 204
    assert (await stage.http.get(f"{stage.url}/v1/sessions/s/generations/g2")).status_code == 410


async def _nobody_bills(stage: Stage) -> None:
    await stage.broker.js.delete_consumer(STREAM, "billing-0")


async def test_nothing_is_removed_before_billing_has_read_it(
    stage: Stage, broker: Broker, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deleting, "BILLED_SECONDS", 0.3)
    await answered(stage, log, "g1")
    refused = await delete(stage)
    assert (refused.status_code, refused.json()["type"].rpartition(":")[2]) == (503, "billing-behind")
    assert "retry-after" in refused.headers
    assert await subjects(broker) == {log.subject("g1")}
    async with billed(broker, tmp_path) as run:
        await eventually(lambda: run.consumer.applied > 0)
        monkeypatch.setattr(deleting, "BILLED_SECONDS", 10.0)
        assert (await delete(stage)).status_code == 204


async def test_deletion_does_not_wait_for_billing_that_never_ran(
    stage: Stage, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deleting, "UNBILLED_SECONDS", -1.0)
    await answered(stage, log, "g1")
    assert (await delete(stage)).status_code == 204


async def test_subscribers_get_a_gap_and_earlier_cursors_are_refused_after_deletion(
    stage: Stage, nats_url: str, log: Log
) -> None:
    await answered(stage, log, "g1")
    await _nobody_bills(stage)
    async with delivering(nats_url) as second:  # applying the topology makes billing's consumer again
        await _nobody_bills(stage)
        await eventually(lambda: second.replica.deleted.heard)
        readers = [stage.events(), second.events()]
        async with readers[0].connected() as here, readers[1].connected() as there:
            assert await here.count(6)
            assert await there.count(6)
            assert (await delete(stage)).status_code == 204
            async with asyncio.timeout(15):
                await here.to_the_end()
                await there.to_the_end()
        for reader, replica in zip(readers, (stage, second), strict=True):
            assert reader.controls == [("gap", {"reason": "deleted"})]
            headers = {"Last-Event-ID": reader.ids[-1]}
            again = await replica.http.get(f"{replica.url}/v1/sessions/s/events", headers=headers)
            assert (again.status_code, again.json()["type"].rpartition(":")[2]) == (410, "session-deleted")


async def test_a_replica_that_missed_the_deletion_message_detects_the_deletion(stage: Stage, log: Log) -> None:
    await answered(stage, log, "g1")
    await _nobody_bills(stage)
    reader = stage.events()
    async with reader.connected() as connection:
        assert await connection.count(6)
        [feed] = stage.replica.feeds._feeds.values()
        stage.replica.feeds._feeds.clear()  # the message does not find it
        assert (await delete(stage)).status_code == 204
        stage.replica.feeds._feeds[feed.tenant, feed.session] = feed
        await stage.replica.feeds._check(feed)
        async with asyncio.timeout(15):
            await connection.to_the_end()
    assert reader.controls == [("gap", {"reason": "deleted"})]


async def test_a_session_with_a_deleted_name_starts_empty(stage: Stage, broker: Broker, log: Log) -> None:
    await answered(stage, log, "g1")
    await _nobody_bills(stage)
    assert (await delete(stage)).status_code == 204
    async with producing(broker):
        started = await stage.http.post(
            f"{stage.url}/v1/sessions/s/generations",
            json={"model": "scripted/story", "messages": [{"role": "user", "content": "x"}], "params": {"tokens": 3}},
        )
        assert started.status_code == 202
        reader = stage.events(after=started.json()["cursor"])
        async with reader.connected() as connection:
            await connection.until(lambda client: bool(client.events) and client.events[-1]["type"] == "completed")
    assert {event["generation"] for event in reader.events} == {started.json()["generation"]}
    assert reader.controls == []
    whole = stage.events(**{"from": "start"})
    async with whole.connected() as connection:
        await connection.count(len(reader.events))
    assert keys(whole.events) == keys(reader.events)
    session = (await stage.http.get(f"{stage.url}/v1/sessions/s")).json()
    assert [g["generation"] for g in session["generations"]] == [started.json()["generation"]]


async def start(stage: Stage, key: str | None = None, **params: Any) -> httpx.Response:
    return await stage.http.post(
        f"{stage.url}/v1/sessions/s/generations",
        json={"model": "scripted/story", "messages": [{"role": "user", "content": "x"}], "params": params},
        headers={"Idempotency-Key": key} if key else {},
    )


async def test_an_idempotency_key_of_a_deleted_generation_is_not_used_again(stage: Stage, broker: Broker) -> None:
    async with producing(broker):
        started = await start(stage, "k1", tokens=2)
        assert started.status_code == 202
        await ended(stage, started.json()["generation"])
    await _nobody_bills(stage)
    assert (await delete(stage)).status_code == 204
    repeated = await start(stage, "k1", tokens=2)
    assert (repeated.status_code, repeated.json()["type"].rpartition(":")[2]) == (410, "session-deleted")
    assert (await start(stage, "k2", tokens=2)).status_code == 202


async def ended(stage: Stage, generation: str, state: str = "completed") -> None:
    async def is_so() -> bool:
        found = await stage.http.get(f"{stage.url}/v1/sessions/s/generations/{generation}")
        return bool(found.json()["state"] == state)

    await eventually(is_so, timeout=20)


async def test_running_generations_block_deletion_unless_cancel_is_requested(stage: Stage, broker: Broker) -> None:
    await _nobody_bills(stage)
    async with producing(broker):
        one = (await start(stage, tokens=5_000, tokens_per_second=50)).json()["generation"]
        await ended(stage, one, "running")
        refused = await delete(stage)
        assert (refused.status_code, refused.json()["type"].rpartition(":")[2]) == (409, "session-busy")
        assert one in refused.json()["detail"]
        assert (await stage.http.get(f"{stage.url}/v1/sessions/s/generations/{one}")).json()["state"] == "running"
        assert (await delete(stage, cancel="true")).status_code == 204
        assert await subjects(broker) == set()
    assert (await stage.http.get(f"{stage.url}/v1/sessions/s/generations/{one}")).status_code == 410


async def test_a_queued_request_without_a_producer_blocks_deletion(
    stage: Stage, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deleting, "CANCEL_SECONDS", 0.3)
    one = (await start(stage)).json()["generation"]
    for query in ({}, {"cancel": "true"}):
        refused = await delete(stage, **query)
        assert (refused.status_code, one in refused.json()["detail"]) == (409, True)


async def test_a_pending_start_blocks_deletion_and_an_orphaned_record_does_not(stage: Stage, broker: Broker) -> None:
    await _nobody_bills(stage)
    record = GenerationRecord(
        tenant=TENANT, session="s", generation="g1", state="queued", model="m", created_at=time.time()
    )
    revision = await lookups(stage).create(record)
    assert (await delete(stage)).status_code == 409
    record.created_at = OLD
    assert revision
    assert await lookups(stage).update(record, revision)
    answer = await delete(stage)
    assert answer.status_code == 204, answer.text


async def test_deletion_removes_dead_requests_and_dead_events(stage: Stage, broker: Broker, log: Log) -> None:
    await answered(stage, log, "g1")
    lane = lane_of(Topology().pool, "interactive")
    for session, generation in (("s", "g1"), ("other", "g9")):
        request = Request(tenant=TENANT, session=session, generation=generation, model="m", messages=[])
        await broker.publish_stored(dead_subject(lane, generation), msgspec.json.encode(request))
    service = await Service(stage).created(ack_wait=0.5, max_deliver=1)
    await service.batch()

    async def put_aside() -> bool:
        await service.batch(wait=0.2)  # an event is put aside when it is due again
        return len(await broker.subjects(CONSUMERS, "consumers.dead.>")) == 6

    await eventually(put_aside, timeout=20)
    await _nobody_bills(stage)
    assert (await delete(stage)).status_code == 204
    assert await broker.subjects(DEAD, "dead.>") == [dead_subject(lane, "g9")]
    assert await broker.subjects(CONSUMERS, "consumers.>") == []


@pytest.mark.parametrize(
    ("of", "step"), [(deleting.Deletion, "_bury"), (Broker, "purge"), (deleting.Deletion, "_forget_dead")]
)
async def test_a_deletion_that_was_interrupted_is_finished_by_repeating_it(
    stage: Stage, broker: Broker, log: Log, monkeypatch: pytest.MonkeyPatch, of: type, step: str
) -> None:
    for name in ("g1", "g2", "g3"):
        await answered(stage, log, name)
    await _nobody_bills(stage)
    original, calls = getattr(of, step), 0

    async def fails_the_second_time(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (1 if step == "_forget_dead" else 2):
            raise BrokerUnavailable("gone")
        return await original(self, *arguments)

    monkeypatch.setattr(of, step, fails_the_second_time)
    assert (await delete(stage)).status_code == 503
    monkeypatch.undo()
    assert (await delete(stage)).status_code == 204
    assert await subjects(broker) == set()
    assert await lookups(stage).of_session(TENANT, "s") == []


async def test_a_start_during_a_deletion_is_complete_or_refused(stage: Stage, broker: Broker, log: Log) -> None:
    """Run deletions and starts concurrently: each start is complete or refused, none loses its first events."""
    await _nobody_bills(stage)
    await answered(stage, log, "g1")
    stop = asyncio.Event()

    async def deletes() -> list[int]:
        found = []
        while not stop.is_set():
            found.append((await delete(stage)).status_code)
        return found

    async with producing(broker):
        deleter = asyncio.create_task(deletes())
        for _ in range(5):
            started = await start(stage, tokens=20, tokens_per_second=200)
            assert started.status_code == 202
            generation = started.json()["generation"]
            reader = stage.events(generation=generation)
            async with asyncio.timeout(20):
                status = await reader.read_all()
            if status == 200 and reader.events:
                seqs = [event["seq"] for event in reader.events]
                assert seqs == list(range(len(seqs)))
                assert [name for name, _ in reader.controls if name == "gap"] == []
        stop.set()
        codes = set(await deleter)
    assert codes <= {204, 409}


async def test_deleting_needs_the_scope_admin(stage: Stage) -> None:
    schema = (await stage.http.get(f"{stage.url}/docs/openapi.json")).json()
    operation = schema["paths"]["/v1/sessions/{session}"]["delete"]
    assert operation["security"] == [{"credentials": ["admin"]}]
