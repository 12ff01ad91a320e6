"""Test a subscriber from another replica whose cursor is ahead of this replica."""

import asyncio

from nats.aio.subscription import Subscription

from services.kit.jetstream.broker import Broker
from services.kit.jetstream.client import Arrival
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, Stage, delivering, keys, story


def becoming_deaf(stage: Stage) -> asyncio.Event:
    """Let feeds that are opened from now on hear nothing live once the event is set."""
    deaf, listen = asyncio.Event(), stage.broker.listen

    async def partly(subject: str, arrival: Arrival) -> Subscription:
        def hear(subject: str, data: bytes, headers: bytes) -> None:
            if not deaf.is_set():
                arrival(subject, data, headers)

        return await listen(subject, hear)

    stage.broker.listen = partly  # type: ignore[method-assign]
    return deaf


async def test_a_replica_that_is_behind_serves_a_new_subscriber_from_the_log(
    broker: Broker, nats_server: NatsServer
) -> None:
    log, events = Log(broker), story("g1", 20)
    async with delivering(nats_server.url) as behind, delivering(nats_server.url) as ahead:
        deaf = becoming_deaf(behind)
        async with asyncio.timeout(20):
            await log.append(*events[:3])
            staying = behind.events(**{"from": "start"})
            async with staying.connected() as connection:
                assert await connection.count(3)
                (feed,) = behind.replica.feeds._feeds.values()
                deaf.set()
                await log.append(*events[3:10])
                moving = ahead.events(**{"from": "start"})
                async with moving.connected() as elsewhere:
                    assert await elsewhere.count(10)
                moving.http, moving.url = behind.http, staying.url
                async with moving.connected() as here:
                    assert here.status == 200
                    await eventually(lambda: len(feed.subscribers) == 2)
                    await log.append(*events[10:])
                    await feed.check()
                    assert await here.count(len(events))
                assert await connection.count(len(events))
    assert keys(moving.events) == keys(events)
    assert keys(staying.events) == keys(events)
    assert moving.ids == staying.ids == sorted(moving.ids)
