"""Test producers with damaged files: running answers get a correct terminal and every queued request is served."""

import asyncio
from collections.abc import Sequence

import pytest

from schemas.events import AnyEvent, Completed, Interrupted, Restarted, type_of
from schemas.topology import Topology
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from tests.conftest import NatsServer, eventually
from tests.support.producer_worker import accepted_log, ask, ended_log, enqueue, producing, raw_log
from tests.support.store_damage import DAMAGES, LOSING, stream_folder

LONG = {"tokens": 600, "tokens_per_second": 60}


def damage(server: NatsServer, kind: str, stream: str) -> None:
    server.stop()
    DAMAGES[kind](stream_folder(server.folder, stream))
    server.start()


def without_a_gap(events: Sequence[AnyEvent]) -> bool:
    return [event.seq for event in events] == list(range(len(events)))


@pytest.mark.parametrize("kind", ["block-overwritten", "block-truncated", "messages-missing", "stream-missing"])
async def test_an_answer_with_lost_stored_events_ends_as_interrupted(own_nats: NatsServer, kind: str) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.keep(Topology())
        async with producing(broker) as producer:
            request = ask("g1", params=LONG)
            await enqueue(broker, request)
            await has_events(broker, request, 60)
            await asyncio.to_thread(damage, own_nats, kind, "TOKENS_0")
            await eventually(lambda: not producer.running, timeout=30)
        events = await raw_log(broker, request)
        assert isinstance(events[-1], Interrupted)
        assert events[-1].reason == "log_lost"
        readable = [event for event in events if event.epoch < events[-1].epoch and event.seq < events[-1].seq]
        assert (readable[0].seq == 0) == kind.startswith("block")
        assert [event.seq for event in readable] == list(range(readable[0].seq, events[-1].seq))


async def test_a_restartable_answer_with_lost_stored_events_is_restarted(own_nats: NatsServer) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology())
        async with producing(broker):
            request = ask("g1", params=LONG, on_producer_loss="restart")
            await enqueue(broker, request)
            await has_events(broker, request, 60)
            await asyncio.to_thread(damage, own_nats, "block-overwritten", "TOKENS_0")
            events = await ended_log(broker, request, timeout=40)
    assert isinstance(events[-1], Completed)
    assert [event.reason for event in events if isinstance(event, Restarted)] == ["log_lost"]
    assert without_a_gap(events)


async def test_an_answer_without_lost_events_continues_over_a_broker_restart(own_nats: NatsServer) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology())
        async with producing(broker):
            request = ask("g1", params=LONG)
            await enqueue(broker, request)
            await has_events(broker, request, 60)
            await asyncio.to_thread(damage, own_nats, "index-missing", "TOKENS_0")
            events = await ended_log(broker, request, timeout=30)
    assert [type_of(event) for event in events if type_of(event) != "delta"] == ["started", "usage", "completed"]


async def has_events(broker: Broker, request, count: int) -> None:  # type: ignore[no-untyped-def]
    async def enough() -> bool:
        return len(await accepted_log(broker, request)) >= count

    await eventually(enough, timeout=20, interval=0.1)


@pytest.mark.parametrize("kind", DAMAGES)
async def test_requests_queued_after_damage_are_served(own_nats: NatsServer, kind: str) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.keep(Topology())
        async with producing(broker):
            for number in range(6):
                await enqueue(broker, request := ask(f"old{number}"))
                await ended_log(broker, request)
            await asyncio.to_thread(prepare_and_damage, own_nats, kind)
            for number in range(3):
                request = ask(f"new{number}")
                await eventually(lambda request=request: is_queued(broker, request), timeout=30, interval=0.2)
                await ended_log(broker, request, timeout=40)
    assert set(DAMAGES) >= LOSING


def prepare_and_damage(server: NatsServer, kind: str) -> None:
    damage(server, kind, "REQUESTS")


async def is_queued(broker: Broker, request) -> bool:  # type: ignore[no-untyped-def]
    try:
        await enqueue(broker, request)
    except Exception:  # the stream is being made anew, or has it already
        try:
            return await broker.holds("REQUESTS", f"requests.default.{request.generation}")
        except BrokerUnavailable:
            return False
    return True


@pytest.mark.parametrize("kind", ["block-overwritten", "block-truncated", "block-zeroed"])
async def test_an_ended_answer_that_lost_its_terminal_gets_a_new_one(own_nats: NatsServer, kind: str) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology())
        async with producing(broker) as producer:
            for number in range(3):  # so that half of the file lies in the middle of one
                await enqueue(broker, request := ask(f"g{number}"))
                await ended_log(broker, request)
            await producer._losses.logs.state(0)
            await eventually(lambda: not producer._losses.logs._marking)
    damage(own_nats, kind, "TOKENS_0")
    async with Broker.connect(own_nats.url, "test") as broker, producing(broker):
        await enqueue(broker, request := ask("new"))
        await ended_log(broker, request)

        async def all_ended() -> bool:
            stored = await broker.lasts("TOKENS_0", "tokens.0.>")
            names = [message.subject.rsplit(".", 1)[-1] for message in stored]
            ends = [[type_of(e) for e in await accepted_log(broker, ask(name))][-1] for name in names]
            assert set(names) == {"g0", "g1", "new"}, "the third one is lost as a whole"
            return set(ends) == {"completed", "interrupted"} and ends.count("interrupted") == 1

        await eventually(all_ended, timeout=30, interval=0.3)
