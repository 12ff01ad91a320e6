"""Test broker outages, cut connections and lost messages: no event is missed or repeated."""

import asyncio
import contextlib
import random
from collections.abc import Callable

import httpx
import msgspec
import pytest

from schemas.events import AnyEvent
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, Stage, delivering, interleaved, keys, metric, story


async def append_through_outages(log: Log, events: list[AnyEvent], pause: float) -> None:
    """Append as a producer does: again until acknowledged, so that the log may hold an event twice."""
    from nats.errors import Error

    from services.kit.jetstream.broker import BrokerUnavailable
    from services.kit.jetstream.errors import APIError

    for event in events:
        while True:
            try:
                await log.append(event, pause=pause)
                break
            except (BrokerUnavailable, APIError, Error, OSError):
                await asyncio.sleep(0.05)


async def test_broker_restart_loses_no_event(own_nats: NatsServer) -> None:
    events = interleaved(random.Random(2), story("g1", 120), story("g2", 120))
    async with Broker.connect(own_nats.url, "test-log") as broker, delivering(own_nats.url) as stage:
        reader = stage.events(**{"from": "start"})
        stage.http.timeout = None  # type: ignore[assignment]
        async with asyncio.timeout(60), reader.connected() as connection:
            appending = asyncio.create_task(append_through_outages(Log(broker), events, 0.005))
            assert await connection.count(40)
            own_nats.stop()
            await eventually(lambda: not stage.broker.is_connected)
            own_nats.start()
            assert await connection.count(150)
            own_nats.kill()
            await eventually(lambda: not stage.broker.is_connected)
            own_nats.start()
            assert await connection.count(len(events))
            await appending
        assert keys(reader.events) == keys(events) or per_generation(reader.events) == per_generation(events)
        assert len(reader.events) == len(events)
        assert reader.ids == sorted(set(reader.ids))


def per_generation(events: list) -> dict[str, list[int]]:  # type: ignore[type-arg]
    """Order within each generation: the one between generations is the log's, which outages may have changed."""
    found: dict[str, list[int]] = {}
    for generation, seq in keys(events):
        found.setdefault(generation, []).append(seq)
    return found


async def test_events_stored_during_a_disconnect_are_sent_before_later_ones(
    broker: Broker, nats_server: NatsServer
) -> None:
    log = Log(broker)
    first, second, third = story("g1", 20), story("g2", 5), story("g3", 5)
    async with delivering(nats_server.url) as stage:
        reader = stage.events(**{"from": "start"})
        async with reader.connected() as connection:
            await log.append(*first[:10])
            assert await connection.count(10)
            lost, later = [*first[10:15], *second], [*third, *first[15:]]
            released = cut_off(stage)
            await log.append(*lost)
            released()
            await log.append(*later)  # arrives on the new connection, perhaps before anything has been read back
            async with asyncio.timeout(20):
                assert await connection.count(len(first + second + third))
        assert keys(reader.events) == keys([*first[:10], *lost, *later])


def cut_off(stage: Stage) -> Callable[[], None]:
    """Cut the hub's connection to the broker; it cannot come back until the returned function is called."""
    client = stage.broker.client
    original = client._select_next_server
    gate = asyncio.Event()

    async def waiting() -> None:
        await gate.wait()
        await original()

    client._select_next_server = waiting  # type: ignore[method-assign]
    assert client._transport is not None
    client._transport._io_writer.transport.abort()  # type: ignore[attr-defined]

    def release() -> None:
        client._select_next_server = original  # type: ignore[method-assign]
        gate.set()

    return release


@pytest.mark.parametrize("seed", range(6))
async def test_lost_live_messages_are_read_from_the_log(broker: Broker, nats_server: NatsServer, seed: int) -> None:
    rng = random.Random(seed)
    log, events = Log(broker), interleaved(rng, *(story(f"g{n}", 40) for n in range(rng.randint(1, 4))))
    async with delivering(nats_server.url) as stage:
        healed = metric("tailrace_delivery_gaps_total", healed="yes")
        lose(stage, rng)
        reader = stage.events(**{"from": "start"})
        async with asyncio.timeout(20), reader.connected() as connection:
            await log.append(*events)
            await log.append(*story("last", 1))  # somebody who loses the very last message learns of it by the next
            assert await connection.until(lambda r: per_generation(r.events).get("last") == [0, 1, 2, 3])
            with contextlib.suppress(httpx.ReadTimeout):
                await connection.count(len(events) + 4)
        expected = per_generation(events)
        assert {g: s for g, s in per_generation(reader.events).items() if g != "last"} == expected
        assert reader.ids == sorted(reader.ids)
        assert metric("tailrace_delivery_gaps_total", healed="yes") > healed


def lose(stage: Stage, rng: random.Random) -> None:
    """Lose a tenth of the live messages of feeds opened from now on; never the last of a generation."""
    original = stage.broker.listen

    async def lossy(subject: str, arrival):  # type: ignore[no-untyped-def]
        def sometimes(subject: str, data: bytes, headers: bytes) -> None:
            if rng.random() > 0.1 or b'"completed"' in data or subject.endswith(".last"):
                arrival(subject, data, headers)

        return await original(subject, sometimes)

    stage.broker.listen = lossy  # type: ignore[method-assign,assignment]


async def test_a_lost_start_is_shown_when_a_later_loss_of_another_answer_is_read_first(
    broker: Broker, nats_server: NatsServer
) -> None:
    """Reading from behind the loss of one answer meets the other one in its middle."""
    log, one, two = Log(broker), story("g1", 8), story("g2", 3)
    order = [*one[:3], two[0], *one[3:5], two[1], one[5], *two[2:], *one[6:]]
    lost = {("g2", 0), ("g1", 4), ("g2", 1)}
    async with delivering(nats_server.url) as stage:
        original = stage.broker.listen

        async def lossy(subject: str, arrival):  # type: ignore[no-untyped-def]
            def without_lost(subject: str, data: bytes, headers: bytes) -> None:
                event = msgspec.json.decode(data)
                if (event["generation"], event["seq"]) not in lost:
                    arrival(subject, data, headers)

            return await original(subject, without_lost)

        stage.broker.listen = lossy  # type: ignore[method-assign,assignment]
        reader = stage.events(**{"from": "start"})
        async with asyncio.timeout(20), reader.connected() as connection:
            for event in order:
                await log.append(event)
            assert await connection.count(len(order))
        assert per_generation(reader.events) == per_generation(order)
        assert reader.ids == sorted(reader.ids)


async def test_start_of_an_answer_that_gets_lost_is_read_from_the_log(broker: Broker, nats_server: NatsServer) -> None:
    log, before, events = Log(broker), story("g1", 3), story("g2", 5)
    async with delivering(nats_server.url) as stage:
        original = stage.broker.listen

        async def lossy(subject: str, arrival):  # type: ignore[no-untyped-def]
            def without_started(subject: str, data: bytes, headers: bytes) -> None:
                if b'"started"' not in data:
                    arrival(subject, data, headers)

            return await original(subject, without_started)

        stage.broker.listen = lossy  # type: ignore[method-assign,assignment]
        await log.append(*before)
        reader = stage.events()
        async with asyncio.timeout(10), reader.connected() as connection:
            assert await connection.count(len(before))
            await log.append(*events)
            assert await connection.count(len(before + events))
        assert keys(reader.events) == keys(before + events)


async def test_large_read_back_is_sent_without_waiting_for_the_next_event(
    broker: Broker, nats_server: NatsServer
) -> None:
    log, events = Log(broker), story("g1", 60, size=60_000)
    async with delivering(nats_server.url) as stage:
        reader = stage.events()
        async with reader.connected() as connection:
            await log.append(*events[:2])
            assert await connection.count(2)
            released = cut_off(stage)
            await log.append(*events[2:])
            released()
            async with asyncio.timeout(20):
                assert await connection.count(len(events))
        assert keys(reader.events) == keys(events)


async def test_broker_outage_while_a_feed_opens_is_503_and_the_next_request_works(own_nats: NatsServer) -> None:
    async with Broker.connect(own_nats.url, "test-log") as broker, delivering(own_nats.url) as stage:
        await Log(broker).append(*story("g1"))
        own_nats.stop()
        await eventually(lambda: not stage.broker.is_connected)
        response = await stage.http.get(f"{stage.url}/v1/sessions/s/events", timeout=20)
        assert response.status_code == 503
        assert not stage.replica.feeds._opening
        own_nats.start()
        await eventually(lambda: stage.broker.is_connected)
        reader = stage.events(generation="g1")
        await reader.follow(lambda r: len(r.events) == 13)
        assert keys(reader.events) == keys(story("g1"))
