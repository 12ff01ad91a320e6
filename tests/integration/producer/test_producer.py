"""The producer on a real broker: from the queue to the terminal in the log."""

import asyncio
import json

import msgspec
import pytest

from schemas.codec import encode_event
from schemas.control import HEARD, OVER, OVER_BUDGET
from schemas.events import Completed, Delta, Failed, Started, UsageReported, type_of
from schemas.requests import GenerationRecord
from schemas.subjects import Address, control_subject, request_subject, token_subject
from schemas.topology import DEAD, REQUESTS, Topology
from services.kit.jetstream.broker import Broker
from services.producer.core.deadlines import Deadlines
from tests.conftest import NatsServer, eventually
from tests.support.producer_worker import accepted_log, ask, ended_log, enqueue, producing, raw_log, text_of


async def queue_is_empty(broker: Broker) -> bool:
    info = await broker.js.stream_info(REQUESTS)
    return info.state.messages == 0


async def test_a_request_becomes_a_gapless_log_with_one_terminal(broker: Broker) -> None:
    request = ask("g1", metadata={"user": "u1"})
    async with producing(broker):
        await enqueue(broker, request)
        events = await ended_log(broker, request)
        await eventually(lambda: queue_is_empty(broker))
    assert [event.seq for event in events] == list(range(len(events)))
    started, completed = events[0], events[-1]
    assert isinstance(started, Started)
    assert (started.provider, started.upstream_model, started.metadata) == ("scripted", "story", {"user": "u1"})
    assert isinstance(events[-2], UsageReported)
    assert isinstance(completed, Completed)
    assert completed.counted.output == events[-2].usage.output == 20
    assert completed.counted.input == events[-2].usage.input
    deltas = [event for event in events if isinstance(event, Delta)]
    assert deltas[-1].tokens == 20
    assert [event.tokens for event in deltas] == sorted(event.tokens for event in deltas)


async def test_the_tokens_of_one_read_become_one_event(broker: Broker) -> None:
    request = ask("g1", "scripted/megabyte", params={"tokens_per_second": 10_000_000})
    async with producing(broker):
        await enqueue(broker, request)
        events = await ended_log(broker, request, timeout=30)
    assert isinstance(events[-1], Completed)
    text = text_of(events)
    assert len(text.encode()) >= 1_000_000
    assert len(events) < len(text) / 100


async def test_no_more_generations_than_slots_run(broker: Broker) -> None:
    requests = [ask(f"g{n}", params={"tokens": 10, "tokens_per_second": 100}) for n in range(9)]
    most = 0
    async with producing(broker, slots=3) as worker:
        for request in requests:
            await enqueue(broker, request)
        while not await queue_is_empty(broker):
            most = max(most, len(worker.running))
            await asyncio.sleep(0.005)
    assert most == 3
    for request in requests:
        assert isinstance((await accepted_log(broker, request))[-1], Completed)


async def test_two_producers_share_the_queue(broker: Broker) -> None:
    requests = [ask(f"g{n}", params={"tokens": 20, "tokens_per_second": 100}) for n in range(8)]
    async with producing(broker, slots=4) as one, producing(broker, slots=4) as other:
        for request in requests:
            await enqueue(broker, request)
        await eventually(lambda: len(one.running) == 4 and len(other.running) == 4)
        for request in requests:
            assert isinstance((await ended_log(broker, request))[-1], Completed)


@pytest.mark.parametrize(
    ("deadlines", "code"),
    [
        (Deadlines(between_tokens=0.3), "deadline_between_tokens"),
        (Deadlines(total=0.5, between_tokens=5), "deadline_total"),
    ],
)
async def test_a_stalled_provider_ends_as_a_typed_failure(broker: Broker, deadlines: Deadlines, code: str) -> None:
    request = ask("g1", "scripted/stall", params={"tokens": 20, "stall_after": 5, "tokens_per_second": 500})
    async with producing(broker, deadlines=deadlines):
        await enqueue(broker, request)
        events = await ended_log(broker, request)
    failed = events[-1]
    assert isinstance(failed, Failed)
    assert (failed.code, failed.recoverable) == (code, True)
    assert failed.counted.output == 5
    assert text_of(events)


async def test_a_provider_that_never_begins_fails_by_its_first_token_deadline(broker: Broker) -> None:
    request = ask("g1", "scripted/stall", params={"stall_after": 0})
    async with producing(broker, deadlines=Deadlines(first_token=0.3)):
        await enqueue(broker, request)
        failed = (await ended_log(broker, request))[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "deadline_first_token"


@pytest.mark.parametrize(
    ("model", "params", "code"),
    [
        ("scripted/cutoff", {"cutoff_after": 5, "tokens": 20, "tokens_per_second": 500}, "upstream_cut_off"),
        ("scripted/error", {"error_after": 5, "tokens": 20, "tokens_per_second": 500}, "upstream_error"),
        ("scripted/refuse", {}, "upstream_rate_limited"),
        ("nowhere/at-all", {}, "unknown_model"),
    ],
)
async def test_a_provider_that_does_not_finish_fails_the_generation(
    broker: Broker, model: str, params: dict[str, int], code: str
) -> None:
    request = ask("g1", model, params=params)
    async with producing(broker):
        await enqueue(broker, request)
        failed = (await ended_log(broker, request))[-1]
    assert isinstance(failed, Failed)
    assert failed.code == code


async def test_a_running_generation_is_cancelled_at_once(broker: Broker) -> None:
    request = ask("g1", params={"tokens": 500, "tokens_per_second": 50})
    async with producing(broker):
        await enqueue(broker, request)
        await eventually(lambda: _has_deltas(broker, request, 5))
        answer = await broker.request(control_subject("default", "s", "g1"), b"cancel")
        events = await ended_log(broker, request)
        await eventually(lambda: queue_is_empty(broker))
        assert await broker.request(control_subject("default", "s", "g1"), b"cancel") == OVER
    assert answer == b"ok"
    assert type_of(events[-1]) == "cancelled"
    assert 5 <= events[-1].counted.output < 100


async def test_a_generation_beyond_its_budget_fails_with_its_counted_usage(broker: Broker) -> None:
    request = ask("g1", params={"tokens": 500, "tokens_per_second": 50})
    request.key = "k-7"
    async with producing(broker):
        await enqueue(broker, request)
        await eventually(lambda: _has_deltas(broker, request, 5))
        assert await broker.request(control_subject("default", "s", "g1"), OVER_BUDGET) == HEARD
        events = await ended_log(broker, request)
        await eventually(lambda: queue_is_empty(broker))
    assert isinstance(events[0], Started)
    assert events[0].key == "k-7"
    assert isinstance(events[-1], Failed)
    assert (events[-1].code, events[-1].recoverable) == ("budget_exceeded", False)
    assert 5 <= events[-1].counted.output < 100


async def test_a_generation_cancelled_while_it_is_queued_never_asks_the_provider(broker: Broker) -> None:
    request = ask("g1")
    record = GenerationRecord(
        tenant="default", session="s", generation="g1", state="cancelling", model=request.model, created_at=1.0
    )
    bucket = await broker.bucket()
    await bucket.put("default.s.g1", msgspec.json.encode(record))
    await enqueue(broker, request)
    async with producing(broker):
        events = await ended_log(broker, request)
    assert [type_of(event) for event in events] == ["started", "cancelled"]


async def test_the_record_follows_the_generation(broker: Broker) -> None:
    request = ask("g1")
    async with producing(broker):
        await enqueue(broker, request)
        await ended_log(broker, request)
        bucket = await broker.bucket()
        entry = await eventually(lambda: _entry(bucket, "default.s.g1", "completed"))
    assert entry["counted"]["output"] == 20
    assert entry["provider"] == "scripted"


async def test_a_begun_generation_of_a_lost_producer_is_closed_as_interrupted(broker: Broker) -> None:
    request = ask("g1")
    await _leave_behind(broker, request, deltas=3)
    async with producing(broker):
        await enqueue(broker, request)
        events = await ended_log(broker, request)
        await eventually(lambda: queue_is_empty(broker))
    assert [type_of(event) for event in events] == ["started", "delta", "delta", "delta", "interrupted"]
    assert (events[-1].epoch, events[-1].counted.output) == (2, 3)


async def test_a_begun_generation_that_may_restart_runs_again_in_a_new_epoch(broker: Broker) -> None:
    request = ask("g1", on_producer_loss="restart")
    await _leave_behind(broker, request, deltas=3)
    async with producing(broker):
        await enqueue(broker, request)
        events = await ended_log(broker, request)
    assert [type_of(event) for event in events[:5]] == ["started", "delta", "delta", "delta", "restarted"]
    assert type_of(events[-1]) == "completed"
    assert {event.epoch for event in events[4:]} == {2}
    fresh = ask("g2")
    async with producing(broker):
        await enqueue(broker, fresh)
        assert text_of(await ended_log(broker, fresh)) == text_of(events)


async def test_a_started_generation_without_tokens_is_restarted(broker: Broker) -> None:
    request = ask("g1")
    await _leave_behind(broker, request, deltas=0)
    async with producing(broker):
        await enqueue(broker, request)
        events = await ended_log(broker, request)
    assert [type_of(event) for event in events[:2]] == ["started", "restarted"]
    assert type_of(events[-1]) == "completed"


async def test_an_ended_generation_is_not_run_again(broker: Broker) -> None:
    request = ask("g1")
    async with producing(broker):
        await enqueue(broker, request)
        before = await ended_log(broker, request)
        await eventually(lambda: queue_is_empty(broker))
        await enqueue(broker, request)
        await eventually(lambda: queue_is_empty(broker))
    assert await raw_log(broker, request) == before


async def test_an_unreadable_request_becomes_dead(broker: Broker) -> None:
    async with producing(broker):
        await broker.publish_stored(request_subject("default", "broken"), b'{"tenant": 5}')
        await eventually(lambda: queue_is_empty(broker))
    dead = await broker.last(DEAD, "dead.default.*")
    assert dead is not None
    assert dead.data == b'{"tenant": 5}'


async def test_a_generation_that_outlives_its_drain_is_handed_to_another_producer(broker: Broker) -> None:
    request = ask("g1", params={"tokens": 400, "tokens_per_second": 50}, on_producer_loss="restart")
    async with producing(broker, drain=0.0):
        await enqueue(broker, request)
        await eventually(lambda: _has_deltas(broker, request, 3))
    assert not await queue_is_empty(broker)
    async with producing(broker):
        await eventually(lambda: _restarted(broker, request))
        await broker.request(control_subject("default", "s", "g1"), b"cancel")
        events = await ended_log(broker, request)
    assert type_of(events[-1]) == "cancelled"


async def test_a_stream_continues_over_a_broker_restart(own_nats: NatsServer) -> None:
    request = ask("g1", params={"tokens": 300, "tokens_per_second": 100})
    reference = ask("g2", params={"tokens": 300, "tokens_per_second": 20_000})
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology())
        async with producing(broker):
            await enqueue(broker, request)
            await eventually(lambda: _has_deltas(broker, request, 20))
            own_nats.kill()
            await asyncio.sleep(0.3)
            own_nats.start()
            await eventually(lambda: broker.is_connected)
            events = await ended_log(broker, request, timeout=30)
            await enqueue(broker, reference)
            expected = text_of(await ended_log(broker, reference))
    assert isinstance(events[-1], Completed)
    assert text_of(events) == expected
    assert [event.seq for event in events] == list(range(len(events)))


async def _leave_behind(broker: Broker, request, *, deltas: int) -> None:  # type: ignore[no-untyped-def]
    subject = token_subject(Address.of("default", "s", request.generation, 1))
    started = Started(generation=request.generation, seq=0, model=request.model, provider="p", upstream_model="m")
    await broker.publish_stored(subject, encode_event(started))
    for n in range(deltas):
        delta = Delta(generation=request.generation, seq=n + 1, text=f" old{n}", tokens=n + 1)
        await broker.publish_stored(subject, encode_event(delta))


async def _has_deltas(broker: Broker, request, count: int) -> bool:  # type: ignore[no-untyped-def]
    events = await accepted_log(broker, request)
    return sum(isinstance(event, Delta) for event in events) >= count


async def _restarted(broker: Broker, request) -> bool:  # type: ignore[no-untyped-def]
    return any(type_of(event) == "restarted" for event in await accepted_log(broker, request))


async def _entry(bucket, key: str, state: str):  # type: ignore[no-untyped-def]
    entry = json.loads((await bucket.get(key)).value)
    return entry if entry["state"] == state else None


async def test_an_unreadable_request_with_a_known_generation_fails_it_as_poison(broker: Broker) -> None:
    request = ask("g1")
    broken = {"tenant": "default", "session": "s", "generation": "g1", "model": 5, "messages": "?"}
    async with producing(broker):
        await broker.publish_stored(request_subject("default", "g1"), msgspec.json.encode(broken))
        events = await ended_log(broker, request)
        await eventually(lambda: queue_is_empty(broker))
    failed = events[-1]
    assert isinstance(failed, Failed)
    assert (len(events), failed.code) == (1, "poison")
    assert await broker.last(DEAD, "dead.default.g1") is not None


async def test_a_deeply_nested_request_becomes_dead_and_is_not_redelivered(broker: Broker) -> None:
    async with producing(broker):
        await broker.publish_stored(request_subject("default", "deep"), b"[" * 100_000)
        await eventually(lambda: queue_is_empty(broker))
    assert await broker.last(DEAD, "dead.default.deep") is not None
