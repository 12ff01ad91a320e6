"""Test durable consumers over HTTP, on a real broker: delivery, settlement, redelivery and dead events."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from schemas.events import Cancelled, Completed, Delta, Restarted, Started
from services.kit.jetstream.broker import Broker
from tests.conftest import eventually
from tests.support.consumer_server import Service, Stage, consuming, seqs
from tests.support.delivery_server import Log, keys, metric, story


@pytest.fixture
async def stage(nats_url: str, broker: Broker) -> AsyncIterator[Stage]:
    async with consuming(nats_url) as running:
        yield running


@pytest.fixture
def log(broker: Broker) -> Log:
    return Log(broker)


async def test_a_consumer_receives_stored_events_and_then_new_ones(stage: Stage, log: Log) -> None:
    await log.append(*story("g1", 5))
    service = await Service(stage).created()
    first = await service.batch()
    assert seqs(first) == keys(story("g1", 5))
    assert {e["session"] for e in first} == {"s"}
    assert {e["deliveries"] for e in first} == {1}
    await service.ack(first)
    waiting = asyncio.create_task(service.batch(wait=10))
    await eventually(lambda: metric("tailrace_delivery_consumer_sessions") == 1)
    await log.append(*story("g2", 1)[:1])
    assert seqs(await waiting) == [("g2", 0)]


async def test_creating_again_changes_nothing_and_keeps_the_position(stage: Stage, log: Log) -> None:
    await log.append(*story("g1", 1))
    service = Service(stage)
    assert (await service.put(ack_wait=5)).status_code == 201
    await service.ack(await service.batch())
    assert (await service.put(ack_wait=5)).status_code == 200
    answer = await service.put(ack_wait=7, max_in_flight=3, types=["completed"])
    assert answer.status_code == 200
    assert (answer.json()["ack_wait"], answer.json()["max_in_flight"]) == (7, 3)
    assert await service.batch() == []
    await log.append(*story("g2", 3))
    assert [e["event"]["type"] for e in await service.take(1)] == ["completed"]


async def test_session_and_start_of_a_consumer_cannot_be_changed(stage: Stage) -> None:
    service = await Service(stage).created(session="s")
    for wish in ({"session": "other"}, {}, {"session": "s", "start": "new"}, {"session": "s", "since": 1.0}):
        answer = await service.put(**wish)
        assert answer.status_code == 409, wish
        assert answer.json()["type"] == "urn:tailrace:problem:conflict"


async def test_a_new_consumer_from_now_on_a_time_or_a_cursor_begins_there(stage: Stage, log: Log) -> None:
    await log.append(*story("g1", 2))
    everything = await Service(stage, "all").created()
    cursor = (await everything.batch())[2]["cursor"]
    now = await Service(stage, "now").created(start="new")
    since = await Service(stage, "since").created(since=time.time())
    behind = await Service(stage, "behind").created(session="s", after=cursor)
    await log.append(*story("g2", 0))
    assert seqs(await now.take(3)) == keys(story("g2", 0))
    assert seqs(await behind.take(5)) == [("g1", 3), ("g1", 4), *keys(story("g2", 0))]
    assert seqs(await since.take(3)) == keys(story("g2", 0))


async def test_a_consumer_of_one_session_gets_nothing_of_another(stage: Stage, broker: Broker, log: Log) -> None:
    await Log(broker, "other").append(*story("x", 2))
    await log.append(*story("g1", 2))
    one = await Service(stage, "one").created(session="s")
    assert seqs(await one.take(5)) == keys(story("g1", 2))
    assert await one.batch() == []
    everything = await Service(stage, "all").created()
    assert len(await everything.take(10)) == 10


async def test_filtered_types_are_skipped_and_acknowledged(stage: Stage, log: Log) -> None:
    service = await Service(stage).created(types=["started", "completed"], max_in_flight=2)
    await log.append(*story("g1", 20), *story("g2", 20))
    events = await service.take(4)
    assert [e["event"]["type"] for e in events] == ["started", "completed"] * 2
    assert await service.batch() == []
    view = await service.view()
    assert (view["in_flight"], view["pending"], view["dead"]) == (0, 0, 0)


async def test_an_unacknowledged_event_is_redelivered(stage: Stage, log: Log) -> None:
    service = await Service(stage).created(ack_wait=0.5)
    await log.append(*story("g1", 0))
    first = await service.batch()
    assert (await service.view())["in_flight"] == 3
    await service.ack(first[:1])
    again = await service.batch(wait=5)
    assert [(e["event"]["seq"], e["deliveries"]) for e in again] == [(1, 2), (2, 2)]
    await service.ack(again)
    assert (await service.view())["in_flight"] == 0


async def test_a_late_acknowledgement_of_an_earlier_delivery_counts(stage: Stage, log: Log) -> None:
    service = await Service(stage).created(ack_wait=0.5)
    await log.append(*story("g1", 0)[:1])
    first = await service.batch()
    assert [e["deliveries"] for e in await service.batch(wait=5)] == [2]
    await service.ack(first)
    assert (await service.view())["in_flight"] == 0


async def test_a_nacked_event_is_redelivered_at_once_or_after_its_delay(stage: Stage, log: Log) -> None:
    service = await Service(stage).created(ack_wait=60)
    await log.append(*story("g1", 0)[:2])
    first = await service.batch()
    settled = await service.settle(nacks=[first[0]["token"]])
    assert settled["settled"] == 1
    again = await service.batch(wait=5)
    assert [(e["event"]["seq"], e["deliveries"]) for e in again] == [(0, 2)]
    await service.settle(nacks=[first[1]["token"]], delay=0.5)
    assert [(e["event"]["seq"], e["deliveries"]) for e in await service.batch(wait=5)] == [(1, 2)]


async def test_working_extends_the_acknowledgement_wait(stage: Stage, log: Log) -> None:
    service = await Service(stage).created(ack_wait=1.0)
    await log.append(*story("g1", 0)[:1])
    (event,) = await service.batch()
    for _ in range(5):
        await asyncio.sleep(0.4)  # the passing of time is what is tested
        assert (await service.settle(working=[event["token"]]))["settled"] == 1
    assert await service.batch() == []
    await service.ack([event])


async def test_no_more_events_than_max_in_flight_are_in_flight(stage: Stage, log: Log) -> None:
    service = await Service(stage).created(max_in_flight=4)
    await log.append(*story("g1", 20))
    first = await service.batch()
    assert len(first) == 4
    assert await service.batch() == []
    await service.ack(first[:3])
    assert len(await service.batch()) == 3


async def test_an_event_delivered_too_often_becomes_dead_and_can_be_resent(stage: Stage, log: Log) -> None:
    service = await Service(stage).created(ack_wait=0.3, max_deliver=2)
    await log.append(*story("g1", 0)[:2])
    (poison, fine) = await service.batch()
    await service.ack([fine])
    assert [e["deliveries"] for e in await service.batch(wait=5)] == [2]
    assert await service.batch(wait=1) == []
    (dead,) = await service.dead()
    assert (dead["id"], dead["deliveries"], dead["generation"], dead["seq"]) == (poison["cursor"], 2, "g1", 0)
    view = await service.view()
    assert (view["dead"], view["in_flight"], view["again"]) == (1, 0, 0)
    one = await stage.http.get(f"{service.path}/dead/{dead['id']}")
    assert one.json()["event"] == poison["event"]
    resent = await stage.http.post(f"{service.path}/dead/{dead['id']}/resend")
    assert resent.status_code == 202
    assert await service.dead() == []
    assert (await service.view())["again"] == 1
    (again,) = await service.batch(wait=5)
    assert (again["event"], again["cursor"], again["deliveries"]) == (poison["event"], poison["cursor"], 1)
    await service.ack([again])
    assert (await service.view())["again"] == 0


async def test_a_resent_dead_event_can_become_dead_again_and_be_removed(stage: Stage, log: Log) -> None:
    service = await Service(stage).created(ack_wait=0.2, max_deliver=1)
    await log.append(*story("g1", 0)[:1])
    await service.batch()
    await service.batch(wait=1)
    (dead,) = await service.dead()
    assert (await stage.http.post(f"{service.path}/dead/{dead['id']}/resend")).status_code == 202
    assert len(await service.batch(wait=5)) == 1
    await service.batch(wait=1)
    assert [e["id"] for e in await service.dead()] == [dead["id"]]
    assert (await stage.http.delete(f"{service.path}/dead/{dead['id']}")).status_code == 204
    assert (await stage.http.delete(f"{service.path}/dead/{dead['id']}")).status_code == 404
    assert (await service.view())["dead"] == 0


async def test_at_the_limit_of_dead_events_the_next_one_stays_in_flight(nats_url: str, broker: Broker) -> None:
    async with consuming(nats_url, consumer_dead=1) as stage:
        service = await Service(stage).created(ack_wait=0.2, max_deliver=1)
        await Log(broker).append(*story("g1", 0)[:2])
        await service.batch()
        await service.batch(wait=1)
        assert len(await service.dead()) == 1
        assert (await service.view())["in_flight"] == 1
        assert metric("tailrace_delivery_consumer_dead_refused_total") >= 1


async def test_a_dead_event_too_large_to_store_keeps_its_generation_and_seq(stage: Stage, log: Log) -> None:
    service = await Service(stage).created(ack_wait=0.2, max_deliver=1)
    room = 1_048_576 - len('{"type":"started","generation":"g1","seq":0,"model":""}')
    await log.append_bytes("g1", b'{"type":"started","generation":"g1","seq":0,"model":"%b"}' % (b"x" * room))
    assert len(await service.batch()) == 1
    assert await service.batch(wait=1) == []
    (dead,) = await service.dead()
    assert (dead["generation"], dead["seq"], dead["event"]) == ("g1", 0, None)
    assert (await stage.http.post(f"{service.path}/dead/{dead['id']}/resend")).status_code == 404
    assert (await service.view())["in_flight"] == 0


async def test_a_paused_consumer_delivers_nothing_until_it_is_resumed(stage: Stage, log: Log) -> None:
    service = await Service(stage).created()
    paused = (await stage.http.post(f"{service.path}/pause")).json()
    assert (paused["paused"], paused["paused_until"]) == (True, None)
    await log.append(*story("g1", 0))
    assert await service.batch() == []
    async with service.stream() as lines:
        assert (await stage.http.post(f"{service.path}/resume")).json()["paused"] is False
        assert seqs(await lines.some(3)) == keys(story("g1", 0))


async def test_a_pause_can_end_by_itself(stage: Stage, log: Log) -> None:
    service = await Service(stage).created()
    paused = (await stage.http.post(f"{service.path}/pause", json={"seconds": 1.5})).json()
    assert paused["paused"]
    assert paused["paused_until"] is not None
    await log.append(*story("g1", 0))
    assert len(await service.batch(wait=10)) == 3
    assert (await service.view())["paused"] is False


async def test_repeats_zombies_and_garbage_in_the_log_never_reach_a_consumer(stage: Stage, log: Log) -> None:
    service = await Service(stage).created(ack_wait=0.5)
    first = story("g1", 3)[:3]
    await log.append(*first, *first)
    await log.append_bytes("g1", b"no event at all")
    await log.append_bytes("g1", b'{"type":"delta","generation":"other","seq":3}')
    taken = Restarted(generation="g1", seq=3, epoch=2, reason="producer_lost")
    await log.append(taken, Delta(generation="g1", seq=4, epoch=1, text="zombie"))
    await log.append(Delta(generation="g1", seq=4, epoch=2, text="new"), Delta(generation="g1", seq=9, epoch=2))
    await log.append(
        Completed(generation="g1", seq=5, epoch=2, finish_reason="stop"),
        Cancelled(generation="g1", seq=6, reason="requested"),
    )
    accepted = [("g1", n) for n in range(6)]
    events = await service.batch()
    assert seqs(events) == accepted
    again = await service.batch(wait=5)
    assert seqs(again) == accepted
    assert {e["deliveries"] for e in again} == {2}
    assert [e["event"] for e in again] == [e["event"] for e in events]
    await service.ack(again)
    assert (await service.view())["in_flight"] == 0


async def test_two_connections_share_the_events_without_repeats(nats_url: str, broker: Broker, log: Log) -> None:
    runs = [story(f"g{n}", 40) for n in range(4)]
    async with consuming(nats_url) as one, consuming(nats_url) as two:
        services = [await Service(one).created(), Service(two)]
        counts = [0, 0]
        seen: list[tuple[str, int]] = []

        async def work(index: int) -> None:
            async with services[index].stream() as lines:
                while len(seen) < sum(map(len, runs)):
                    try:
                        event = await lines.next(within=1)
                    except TimeoutError:
                        return
                    counts[index] += 1
                    seen.extend(seqs([event]))
                    await services[index].ack([event])

        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(work(n)) for n in (0, 1)]
            await eventually(lambda: metric("tailrace_delivery_consumer_sessions") == 2)
            for run in runs:
                for event in run:
                    await log.append(event, event)  # every event is repeated
            assert workers
        assert sorted(seen) == sorted(key for run in runs for key in keys(run))
        assert min(counts) > 0, counts


async def test_a_stream_is_sse_or_ndjson_and_can_acknowledge_automatically(stage: Stage, log: Log) -> None:
    await log.append(*story("g1", 2))
    service = await Service(stage).created()
    async with service.stream("text/event-stream", ack="auto") as lines:
        assert lines.response.headers["content-type"].startswith("text/event-stream")
        events = await lines.some(5)
        assert seqs(events) == keys(story("g1", 2))
        assert all("token" not in event for event in events)

        async def settled() -> bool:
            return bool((await service.view())["in_flight"] == 0)

        await eventually(settled)
    async with service.stream() as lines:
        assert lines.response.headers["content-type"].startswith("application/x-ndjson")
        await log.append(*story("g2", 0))
        assert seqs(await lines.some(3)) == keys(story("g2", 0))


async def test_the_stream_of_a_removed_consumer_ends_with_bye(stage: Stage, log: Log) -> None:
    service = await Service(stage).created()
    async with service.stream() as lines:
        assert (await stage.http.delete(service.path)).status_code == 204
        assert await lines.next() == {"type": "bye", "reason": "deleted"}
    assert (await stage.http.get(service.path)).status_code == 404
    assert (await stage.http.get("".join((stage.url, "/v1/consumers")))).json() == {"consumers": []}


async def test_streams_end_with_a_notice_when_the_replica_stops(stage: Stage) -> None:
    service = await Service(stage).created()
    async with service.stream() as lines:
        await stage.replica.drain(5)
        assert await lines.next() == {"type": "bye", "reason": "drain"}


async def test_an_answer_with_an_expired_beginning_is_delivered_with_a_gap(
    stage: Stage, broker: Broker, log: Log
) -> None:
    stored = await log.append(*story("g1", 4))
    await log.append(Started(generation="g2", seq=0, model="m", provider="p", upstream_model="u"))
    await broker.js.purge_stream("TOKENS_0", seq=stored[2])
    service = await Service(stage).created()
    events = await service.batch()
    assert seqs(events) == [*keys(story("g1", 4))[2:], ("g2", 0)]
    assert [e.get("gap") for e in events] == ["beginning_expired", None, None, None, None, None]
