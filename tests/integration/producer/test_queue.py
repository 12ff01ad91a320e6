"""The work queue: slots, lanes of priority, hand-over, lost leases and the zombies they leave."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from nats.js.api import DiscardPolicy
from prometheus_client import REGISTRY

from schemas.codec import decode_event, encode_event
from schemas.events import Completed, Delta, Interrupted, Restarted, Started, is_terminal, type_of
from schemas.requests import Request
from schemas.subjects import Address, lane_of, request_subject, token_subject
from schemas.topology import REQUESTS, Topology
from services.kit.jetstream.broker import Broker
from services.kit.jetstream.errors import APIError
from services.producer.adapters.claims import Claims
from services.producer.core.retry import RetryPolicy
from services.producer.core.takeover import Begun
from services.producer.lane import QueueMessage
from services.producer.leases import HeldRequest
from services.producer.relay import Relay
from services.producer.worker import Worker
from tests.conftest import eventually
from tests.support.openai_answers import assert_sound, cancel, chunk, code_of, config, deltas, kinds, saying
from tests.support.producer_worker import accepted_log, ask, ended_log, enqueue, producing, raw_log, text_of
from tests.support.provider_server import Replay, providing

QUICK = {"tokens": 3, "tokens_per_second": 200}
ENDLESS = {"tokens": 20, "stall_after": 2, "tokens_per_second": 1_000}
SHORT_LEASE = Topology(ack_wait=1.5)


def subject_of(request: Request) -> str:
    return token_subject(Address.of(request.tenant, request.session, request.generation, 1))


def batch(generation: str, model: str = "scripted/story", **fields: Any) -> Request:
    return ask(generation, model, priority="batch", **fields)


async def put(broker: Broker, requests: Iterable[Request]) -> None:
    for request in requests:
        subject = request_subject(lane_of("default", request.priority), request.generation)
        await broker.publish_stored(subject, msgspec.json.encode(request))


async def beginnings(broker: Broker, requests: Iterable[Request]) -> dict[str, int]:
    """Return where in the log each generation begins, after all have ended."""
    found = {}
    for request in requests:
        await ended_log(broker, request)
        first = await broker.first("TOKENS_0", subject_of(request))
        assert first is not None
        found[request.generation] = first.seq
    return found


async def queue_is_empty(broker: Broker) -> bool:
    return (await broker.js.stream_info(REQUESTS)).state.messages == 0


@pytest.mark.parametrize("slots", [1, 2, 10])
async def test_batch_requests_wait_behind_interactive_ones(broker: Broker, slots: int) -> None:
    later = [batch(f"b{n}", params=QUICK) for n in range(6)]
    first = [ask(f"i{n}", params=QUICK) for n in range(3 * slots + 3)]
    await put(broker, [*later, *first])
    async with producing(broker, slots=slots):
        begun = await beginnings(broker, [*first, *later])
    assert max(begun[r.generation] for r in first) < min(begun[r.generation] for r in later)


@pytest.mark.parametrize("slots", [1, 3, 20])
async def test_batch_alone_is_served(broker: Broker, slots: int) -> None:
    requests = [batch(f"b{n}", params=QUICK) for n in range(8)]
    async with producing(broker, slots=slots):
        await put(broker, requests)
        await beginnings(broker, requests)
        await eventually(lambda: queue_is_empty(broker))


async def test_batch_requests_run_beside_interactive_requests_while_slots_are_free(broker: Broker) -> None:
    async with producing(broker, slots=20) as producer:
        busy = [ask(f"i{n}", "scripted/stall", params=ENDLESS) for n in range(5)]
        await put(broker, busy)
        await eventually(lambda: len(producer.running) == 5)
        requests = [batch(f"b{n}", params=QUICK) for n in range(5)]
        await put(broker, requests)
        await beginnings(broker, requests)
        for request in busy:
            await cancel(broker, request)


async def test_batch_requests_leave_a_slot_for_interactive_requests(broker: Broker) -> None:
    flood = [batch(f"b{n}", "scripted/stall", params=ENDLESS) for n in range(15)]
    async with producing(broker, slots=10, drain=0.0) as producer:
        await put(broker, flood)
        await eventually(lambda: len(producer.running) == 9)
        request = ask("i1", params=QUICK)
        await put(broker, [request])
        assert isinstance((await ended_log(broker, request))[-1], Completed)
        await eventually(lambda: len(producer.running) == 9)


async def test_slots_are_never_exceeded_by_both_lanes_and_cancels(broker: Broker) -> None:
    requests = [
        (ask if n % 2 else batch)(f"g{n}", "scripted/story", params={"tokens": 15, "tokens_per_second": 100})
        for n in range(30)
    ]
    most = 0
    async with producing(broker, slots=4) as producer:
        await put(broker, requests)
        while not await queue_is_empty(broker):
            most = max(most, len(producer.running))
            for relay in list(producer.running.values())[::3]:
                await cancel(broker, relay.request)
        for request in requests:
            await ended_log(broker, request)
            await assert_sound(broker, request)
    assert most == 4


async def test_a_stopping_producer_finishes_running_generations_and_takes_no_new_request(broker: Broker) -> None:
    running = ask("g1", params={"tokens": 40, "tokens_per_second": 60})
    later = ask("g2", params=QUICK)
    async with producing(broker, drain=10.0) as producer:
        await enqueue(broker, running)
        await deltas(broker, running)
        leaving = asyncio.create_task(_enqueue_while_stopping(broker, producer, later))
    await leaving
    assert type_of((await assert_sound(broker, running))[-1]) == "completed"
    assert await accepted_log(broker, later) == []
    async with producing(broker):
        assert isinstance((await ended_log(broker, later))[-1], Completed)


async def _enqueue_while_stopping(broker: Broker, producer: Worker, request: Request) -> None:
    await eventually(lambda: not producer.running)  # the block has been left, and what ran has ended
    await enqueue(broker, request)


async def test_generations_that_outlive_the_drain_are_taken_over_before_the_lease_expires(
    broker: Broker, nats_url: str
) -> None:
    restarts = ask("g1", params={"tokens": 60, "tokens_per_second": 60}, on_producer_loss="restart")
    interrupts = ask("g2", params={"tokens": 5_000, "tokens_per_second": 60})
    async with Broker.connect(nats_url, "test-other") as other_broker:
        async with producing(broker, drain=0.0, lease=600.0):
            await enqueue(broker, restarts)
            await enqueue(broker, interrupts)
            await deltas(broker, restarts)
            await deltas(broker, interrupts)
        async with producing(other_broker, lease=600.0):
            await ended_log(broker, restarts)
            await ended_log(broker, interrupts)
            await eventually(lambda: queue_is_empty(broker))
    assert [kind for kind in kinds(await assert_sound(broker, restarts)) if kind != "delta"] == [
        "started",
        "restarted",
        "usage",
        "completed",
    ]
    assert kinds(await assert_sound(broker, interrupts)) == ["started", "delta", "interrupted"]


async def test_an_unresponsive_log_does_not_delay_a_hand_over(
    broker: Broker, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask("g1", params=QUICK, on_producer_loss="restart")
    begun = Started(generation="g1", seq=0, model="m", provider="scripted", upstream_model="story")
    await broker.publish_stored(subject_of(request), encode_event(begun))
    reading = asyncio.Event()

    async def silence(_relay: Relay) -> Begun:
        reading.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with Broker.connect(nats_url, "test-other") as other_broker:
        with monkeypatch.context() as silenced:
            silenced.setattr(Relay, "_read_once", silence)
            async with producing(broker, drain=0.0, lease=600.0):
                await enqueue(broker, request)
                async with asyncio.timeout(30):
                    await reading.wait()
        async with producing(other_broker, lease=600.0):
            assert isinstance((await ended_log(broker, request))[-1], Completed)
            await eventually(lambda: queue_is_empty(broker))


async def _no_heartbeat(_held: HeldRequest) -> None:
    """Send no heartbeat, as a producer that is cut off from its queue."""


async def _no_answer(_held: HeldRequest) -> bool:
    """Return no answer, as an unreachable producer."""
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_lost_lease_stops_a_producer_and_another_closes_the_generation(broker: Broker, nats_url: str) -> None:
    request = ask("g1", params={"tokens": 5_000, "tokens_per_second": 50})
    await broker.apply(SHORT_LEASE)
    lost = REGISTRY.get_sample_value("tailrace_producer_leases_lost_total") or 0
    async with (
        Broker.connect(nats_url, "test-other") as other_broker,
        producing(broker, lease=1.5, append_timeout=3.0) as one,
    ):
        one.leases._renew = _no_heartbeat  # type: ignore[method-assign]  # the fault
        await enqueue(broker, request)
        await deltas(broker, request, 5)
        async with producing(other_broker, lease=1.5):
            await eventually(lambda: not one.running)
            left = await raw_log(broker, request)
            assert not any(map(is_terminal, left)), "who lost its lease writes no terminal"
            events = await ended_log(broker, request)
            await eventually(lambda: queue_is_empty(broker))
        assert await raw_log(broker, request) == [*left, events[-1]]
    await assert_sound(broker, request)
    assert isinstance(events[-1], Interrupted)
    assert events[-1].epoch > 1
    assert events[-1].counted.output == [e.tokens for e in events if isinstance(e, Delta)][-1]
    assert REGISTRY.get_sample_value("tailrace_producer_leases_lost_total") == lost + 1


async def test_a_lease_lost_during_a_stall_check_ends_only_its_own_generation(
    broker: Broker,
) -> None:
    """The stall check may run at the moment at which the lease expires."""
    request, other = ask("g1", "scripted/stall", params=ENDLESS), ask("g2", "scripted/stall", params=ENDLESS)
    async with producing(broker) as producer:
        for one in (request, other):
            await enqueue(broker, one)
            await deltas(broker, one)
        relay = next(r for r in producer.running.values() if r.request.generation == "g1")
        assert relay._attempts is not None
        relay._lease.is_lost = True
        now = asyncio.get_running_loop().time()
        relay._attempts.check_deadlines(now + 2)  # finds the silence, cannot tell it
        await eventually(lambda: len(producer.running) == 1)
        await cancel(broker, other)
        assert type_of((await ended_log(broker, other))[-1]) == "cancelled"
    assert not any(map(is_terminal, await accepted_log(broker, request)))


async def test_a_zombie_that_still_believes_in_its_lease_is_not_accepted(broker: Broker, nats_url: str) -> None:
    request = ask("g1", params={"tokens": 120, "tokens_per_second": 15})
    await broker.apply(SHORT_LEASE)
    async with Broker.connect(nats_url, "test-other") as other_broker, producing(broker, slots=1, lease=1.5) as zombie:
        zombie.leases._renew = _no_heartbeat  # type: ignore[method-assign]  # the fault
        zombie.leases.confirm = _no_answer  # type: ignore[method-assign]
        zombie.leases._seconds = 600.0  # and it does not even know
        await enqueue(broker, request)
        await deltas(broker, request, 5)
        async with producing(other_broker, lease=1.5):
            await ended_log(broker, request)
            await eventually(lambda: not zombie.running)
    stored, events = await raw_log(broker, request), await accepted_log(broker, request)
    assert isinstance(events[-1], Interrupted)
    assert [event.seq for event in events] == list(range(len(events)))
    late = stored[stored.index(events[-1]) + 1 :]
    assert any(isinstance(event, Delta) for event in late), "the zombie went on"
    assert sum(map(is_terminal, late)) == 1, "and even ended it"
    assert sum(map(is_terminal, events)) == 1


async def test_a_zombie_does_not_acknowledge_a_request_that_its_successor_left_unfinished(broker: Broker) -> None:
    """The queue accepts acknowledgements from any client: a zombie's must not remove its successor's request."""
    request = ask("g1", on_producer_loss="restart", params={"tokens": 60, "tokens_per_second": 60})
    await broker.apply(SHORT_LEASE)
    async with producing(broker, lease=1.5) as zombie:
        await enqueue(broker, request)
        await deltas(broker, request, 5)
        # A queue that has lost what it gave gives it to another producer, which begins anew, and is killed.
        address, claims = Address.of("default", "s", "g1", 1), Claims(broker)
        await claims.claim(address, 2, await claims.last(address, 2))
        while True:
            last = await broker.last("TOKENS_0", subject_of(request))
            assert last is not None
            restarted = Restarted(generation="g1", seq=decode_event(last.data).seq + 1, epoch=2, reason="producer_lost")
            headers = {"Nats-Expected-Last-Subject-Sequence": str(last.seq)}
            with suppress(APIError):
                await broker.publish_stored(subject_of(request), encode_event(restarted), headers=headers)
                break
        await eventually(lambda: not zombie.running)
        stored = await raw_log(broker, request)
        assert is_terminal(stored[-1]), "the zombie went to the end"
        assert not any(map(is_terminal, await accepted_log(broker, request))), "for nobody"
        assert not await queue_is_empty(broker)
        events = await ended_log(broker, request)
        await eventually(lambda: queue_is_empty(broker))
    assert events[-1].epoch == 3
    assert type_of(events[-1]) == "completed"
    assert sum(map(is_terminal, events)) == 1


@pytest.mark.parametrize("deliveries", ["1", "2"])
async def test_a_redelivered_request_that_still_runs_is_ignored(broker: Broker, deliveries: str) -> None:
    """A queue that was killed before it stored its deliveries redelivers requests in the same way."""
    request = ask("g1", params={"tokens": 100, "tokens_per_second": 100})
    async with producing(broker) as producer:
        await enqueue(broker, request)
        await deltas(broker, request, 3)
        (reply,) = producer.running
        again = reply.split(".")
        again[4] = deliveries
        subject = request_subject("default", "g1")
        msg = QueueMessage(subject, ".".join(again), msgspec.json.encode(request))
        producer._take(msg, asyncio.get_running_loop().time())
        await ended_log(broker, request)
        await eventually(lambda: queue_is_empty(broker))
        await eventually(lambda: not producer._tasks)
        assert (producer.running, producer.leases.held()) == ({}, [])
    assert kinds(await assert_sound(broker, request)) == ["started", "delta", "usage", "completed"]


async def test_an_epoch_that_another_producer_has_begun_is_not_begun_again(broker: Broker) -> None:
    """The upstream fails, and another producer takes over before the answer is restarted."""
    request = ask("g1", "m", on_producer_loss="restart")
    go_on = asyncio.Event()
    async with providing(saying("mine")) as provider:
        provider.turns = [Replay([chunk("half")], gate=go_on.wait)]
        policy = RetryPolicy(max_attempts=3, base=0.01)
        async with producing(broker, config=config(provider.url), retry=policy):
            await enqueue(broker, request)
            await deltas(broker, request)
            taken_over = Interrupted(generation="g1", seq=2, epoch=2, reason="producer_lost")
            await broker.publish_stored(subject_of(request), encode_event(taken_over))
            go_on.set()
            await eventually(lambda: queue_is_empty(broker))
        assert await raw_log(broker, request) == await accepted_log(broker, request)
    assert kinds(await accepted_log(broker, request)) == ["started", "delta", "interrupted"]
    assert text_of(await accepted_log(broker, request)) == "half"


async def test_a_request_that_kills_every_producer_ends_as_failed_and_can_be_inspected(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask("g1")

    async def broken(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Relay, "run", broken)
    async with producing(broker, max_deliver=1):
        await enqueue(broker, request)
        events = await ended_log(broker, request)
        assert type_of(events[-1]) == "failed"
        assert code_of(events) == "poison"
        dead = await eventually(lambda: broker.last("REQUESTS_DEAD", "dead.default.g1"))
    assert dead.data == msgspec.json.encode(request)


async def test_a_request_that_fails_every_producer_is_started_max_deliver_times(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = 0

    async def broken(*_: object) -> None:
        nonlocal begun
        begun += 1
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Relay, "run", broken)
    monkeypatch.setattr("services.producer.worker._LATER", b'-NAK {"delay": 50000000}')
    request = ask("g1")
    async with producing(broker, max_deliver=3):
        await enqueue(broker, request)
        assert code_of(await ended_log(broker, request)) == "poison"
    assert begun == 3


async def test_deliveries_without_a_start_do_not_count_as_attempts(broker: Broker) -> None:
    request = ask("g1", params=QUICK)
    await enqueue(broker, request)
    subscription = await broker.js.pull_subscribe_bind("producers-default", REQUESTS)
    for _ in range(4):
        (message,) = await subscription.fetch(1, timeout=5)
        await message.nak()
    async with producing(broker, max_deliver=2):
        assert isinstance((await ended_log(broker, request))[-1], Completed)
        await eventually(lambda: queue_is_empty(broker))


@pytest.mark.parametrize("ending", ["restart", "interrupt"])
async def test_a_log_outage_longer_than_all_attempts_does_not_make_a_started_request_dead(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, ending: Any
) -> None:
    monkeypatch.setattr("services.producer.worker._LATER", b'-NAK {"delay": 50000000}')
    request = ask("g1", params={"tokens": 40, "tokens_per_second": 100}, on_producer_loss=ending)
    taken = _taken()
    async with producing(broker, max_deliver=2, append_timeout=0.2):
        await enqueue(broker, request)
        await deltas(broker, request)
        settings = (await broker.js.stream_info("TOKENS_0")).config
        room = {"discard": DiscardPolicy.NEW, "max_bytes": 1}
        await broker.js.update_stream(settings.evolve(**room))
        await eventually(lambda: _taken() >= taken + 6, timeout=30)
        await broker.js.update_stream(settings)
        events = await ended_log(broker, request)
        await eventually(lambda: queue_is_empty(broker))
    assert type_of(events[-1]) == ("completed" if ending == "restart" else "interrupted")
    await assert_sound(broker, request)


def _taken() -> float:
    return REGISTRY.get_sample_value("tailrace_producer_requests_taken_total") or 0.0
