"""Test generations that are cancelled without subscribers, with subscribers on two replicas that leave and return."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from schemas.events import Cancelled, type_of
from schemas.requests import CancelAfter, Request
from schemas.topology import Topology
from services.kit.jetstream.broker import Broker
from services.producer import presence
from services.producer.worker import Worker
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Stage, delivering
from tests.support.openai_answers import assert_sound, cancel, deltas
from tests.support.producer_worker import ask, ended_log, enqueue, producing

SILENT = {"tokens": 20, "stall_after": 2, "tokens_per_second": 1_000}
GRACE = 0.6


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "ASK_INTERVAL", 0.05)


def silent(generation: str, cancel_after: float = GRACE) -> Request:
    return ask(generation, "scripted/stall", params=SILENT, on_disconnect=CancelAfter(cancel_after=cancel_after))


def is_missed(producer: Worker, request: Request) -> bool:
    """Return whether the producer has noticed that there are no subscribers."""
    return request.generation in producer._presence._absent


async def is_disconnected(broker: Broker, request: Request) -> bool:
    await ended_log(broker, request)
    last = (await assert_sound(broker, request))[-1]
    return isinstance(last, Cancelled) and last.reason == "disconnected"


@asynccontextmanager
async def listening(stage: Stage, **query: str) -> AsyncIterator[None]:
    """A subscriber that reads until it is seen to have a token, and stays."""
    client = stage.events(**query)
    async with client.connected() as reader:
        assert await reader.until(lambda c: any(e["type"] == "delta" for e in c.events))
        yield


async def stays_alive(producer: Worker, request: Request, seconds: float = 3 * GRACE) -> None:
    """Watch for longer than the grace: there is nothing else by which to see that nothing happens."""
    await asyncio.sleep(seconds)
    assert [relay.request.generation for relay in producer.running.values()] == [request.generation]


async def test_a_generation_that_never_had_a_subscriber_is_cancelled_after_its_grace_period(broker: Broker) -> None:
    request = silent("g1", 0.3)
    async with producing(broker):
        await enqueue(broker, request)
        assert await is_disconnected(broker, request)


async def test_a_generation_without_on_disconnect_continues_without_subscribers(broker: Broker) -> None:
    request = ask("g1", "scripted/stall", params=SILENT)
    async with producing(broker) as producer:
        await enqueue(broker, request)
        await deltas(broker, request)
        await stays_alive(producer, request, 0.5)
        assert not is_missed(producer, request)
        await cancel(broker, request)
        await ended_log(broker, request)


async def test_the_last_of_ten_subscribers_on_two_replicas_starts_the_grace(broker: Broker, nats_url: str) -> None:
    request = silent("g1")
    async with delivering(nats_url) as one, delivering(nats_url) as two, producing(broker) as producer:
        async with AsyncExitStack() as last_one:
            async with AsyncExitStack() as nine:
                await enqueue(broker, request)
                await deltas(broker, request)
                for number in range(9):
                    query = {"generation": "g1"} if number % 2 else {}
                    await nine.enter_async_context(listening([one, two][number % 3 == 0], **query))
                await last_one.enter_async_context(listening(two, generation="g1"))
                await eventually(lambda: not is_missed(producer, request))
                await stays_alive(producer, request)
            await eventually(lambda: not one.replica.presence._held)
            assert len(two.replica.presence._held) == 1
            await stays_alive(producer, request)
            assert not is_missed(producer, request)
        assert await is_disconnected(broker, request)
        await eventually(lambda: not two.replica.presence._held)


async def test_a_subscriber_returning_within_the_grace_period_keeps_the_generation_running(
    broker: Broker, nats_url: str
) -> None:
    request = silent("g1", 1.5)
    async with delivering(nats_url) as one, delivering(nats_url) as two, producing(broker) as producer:
        await enqueue(broker, request)
        await deltas(broker, request)
        async with listening(one):
            await eventually(lambda: not is_missed(producer, request))
        await eventually(lambda: is_missed(producer, request))
        async with listening(two, generation="g1"):
            await eventually(lambda: not is_missed(producer, request))
            await stays_alive(producer, request, 2.0)
        assert await is_disconnected(broker, request)


async def test_subscribers_of_another_session_or_generation_do_not_count(broker: Broker, nats_url: str) -> None:
    request, other = silent("g1"), ask("g2", "scripted/stall", params=SILENT)
    async with delivering(nats_url) as stage, producing(broker):
        await enqueue(broker, other)
        await deltas(broker, other)
        async with listening(stage, generation="g2"):
            await enqueue(broker, request)
            assert await is_disconnected(broker, request)
        await cancel(broker, other)
        await ended_log(broker, other)


async def test_a_cancel_without_subscribers_has_the_reason_requested(broker: Broker) -> None:
    request = silent("g1", 60)
    async with producing(broker) as producer:
        await enqueue(broker, request)
        await eventually(lambda: is_missed(producer, request))
        await cancel(broker, request)
        last = (await ended_log(broker, request))[-1]
    assert isinstance(last, Cancelled)
    assert last.reason == "requested"


async def test_a_short_broker_outage_cancels_no_generation(
    own_nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "SETTLE_SECONDS", 3.0)
    request = silent("g1", 0.1)
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology())
        async with delivering(own_nats.url) as stage, producing(broker) as producer:
            async with AsyncExitStack() as subscriber:
                first = ask("g0", params={"tokens": 2, "tokens_per_second": 0})
                await enqueue(broker, first)
                await ended_log(broker, first)
                await subscriber.enter_async_context(listening(stage))
                await enqueue(broker, request)
                await deltas(broker, request)
                # the replica is back later than the producer
                stage.broker.client.options["reconnect_time_wait"] = 0.8
                own_nats.kill()
                await eventually(lambda: not broker.is_connected and not stage.broker.is_connected)
                own_nats.start()
                await eventually(lambda: broker.is_connected)
                await eventually(lambda: stage.broker.is_connected)
                await stays_alive(producer, request, 3.5)
            assert await is_disconnected(broker, request)
            assert type_of((await assert_sound(broker, request))[-1]) == "cancelled"
