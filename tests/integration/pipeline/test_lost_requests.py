"""Test generations whose request was lost: a producer closes them, so that no subscriber waits without end."""

import time

import msgspec
import pytest

from schemas.codec import encode_event
from schemas.events import Failed, Interrupted
from schemas.requests import GenerationRecord
from schemas.subjects import Address, generation_key, token_subject
from services.kit.jetstream.broker import Broker
from services.producer.lost_requests import LostRequests
from services.producer.worker import Worker
from tests.conftest import eventually
from tests.support.delivery_server import story
from tests.support.producer_worker import accepted_log, ask, enqueue, producing


async def record(broker: Broker, generation: str, state: str, age: float = 3_600.0) -> None:
    made = GenerationRecord(
        tenant="default",
        session="s",
        generation=generation,
        state=state,  # type: ignore[arg-type]
        model="scripted/story",
        created_at=time.time() - age,
    )
    await (await broker.bucket()).put(generation_key("default", "s", generation), msgspec.json.encode(made))


async def state_of(broker: Broker, generation: str) -> tuple[str, str | None]:
    entry = await (await broker.bucket()).get(generation_key("default", "s", generation))
    found = msgspec.json.decode(entry.value or b"", type=GenerationRecord)
    return found.state, found.code


def orphans(worker: Worker) -> LostRequests:
    return LostRequests(worker.context, worker.leases.holds, 1.0)


@pytest.mark.parametrize("state", ["queued", "cancelling", "running"])
async def test_a_recorded_generation_without_a_queued_request_fails_as_lost(broker: Broker, state: str) -> None:
    await record(broker, "g1", state)
    async with producing(broker) as producer:
        care = orphans(producer)
        await care.poll()
        assert await accepted_log(broker, ask("g1")) == [], "it must be seen twice"
        await care.poll()
        (event,) = await accepted_log(broker, ask("g1"))
        assert isinstance(event, Failed)
        assert event.code == "request_lost"
        await eventually(lambda: is_state(broker, "g1", ("failed", "request_lost")))


async def is_state(broker: Broker, generation: str, wanted: tuple[str, str | None]) -> bool:
    return await state_of(broker, generation) == wanted


async def test_a_started_answer_without_a_producer_is_interrupted(broker: Broker) -> None:
    await record(broker, "g1", "running")
    for event in story("g1", 5)[:-2]:
        await broker.publish_stored(token_subject(Address(0, "default", "s", "g1")), encode_event(event))
    async with producing(broker) as producer:
        care = orphans(producer)
        await care.poll()
        await care.poll()
    event = (await accepted_log(broker, ask("g1")))[-1]
    assert isinstance(event, Interrupted)
    assert (event.reason, event.counted.output) == ("request_lost", 5)


async def test_a_record_without_the_logged_terminal_is_updated(broker: Broker) -> None:
    await record(broker, "g1", "running")
    for event in story("g1", 5):
        await broker.publish_stored(token_subject(Address(0, "default", "s", "g1")), encode_event(event))
    async with producing(broker) as producer:
        care = orphans(producer)
        await care.poll()
        await care.poll()
        await eventually(lambda: is_state(broker, "g1", ("completed", None)))
    assert len(await accepted_log(broker, ask("g1"))) == 8


async def test_queued_running_and_recent_generations_are_not_failed(broker: Broker) -> None:
    await record(broker, "young", "queued", age=1.0)
    await record(broker, "waiting", "queued")
    await record(broker, "running", "running")
    async with producing(broker, slots=1) as producer:
        await enqueue(broker, ask("running", params={"tokens": 300, "tokens_per_second": 100}))
        await eventually(lambda: producer.running)
        await enqueue(broker, ask("waiting"))
        care = orphans(producer)
        for _ in range(3):
            await care.poll()
        assert await accepted_log(broker, ask("young")) == []
        assert await accepted_log(broker, ask("waiting")) == []
        assert not isinstance((await accepted_log(broker, ask("running")))[-1], Interrupted | Failed)
