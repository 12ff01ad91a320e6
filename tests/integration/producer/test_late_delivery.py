"""Test requests delivered after their lease: they belong to the current producer, not to the late receiver."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from bench.chaos.proxy import Link
from bench.processes import free_port
from schemas.events import Completed, Delta, type_of
from schemas.topology import REQUESTS, Topology, producers_durable
from services.kit.jetstream.broker import Broker
from services.producer.adapters.publisher import Lease, Publisher
from services.producer.errors import Fenced
from tests.conftest import NatsServer, eventually
from tests.support.producer_worker import accepted_log, ask, ended_log, enqueue, producing, raw_log

LEASE = 2.0
SLOW = {"tokens": 60, "tokens_per_second": 20}


@pytest.fixture
async def link(nats_server: NatsServer) -> AsyncIterator[Link]:
    between = Link(free_port(), nats_server.port)
    await between.open()
    yield between
    await between.close()


async def in_delivery(broker: Broker) -> bool:
    info = await broker.js.consumer_info(REQUESTS, producers_durable("default"))
    return info.num_ack_pending == 1


async def test_a_request_that_arrives_after_its_lease_is_not_taken_from_its_current_producer(
    broker: Broker, link: Link
) -> None:
    await broker.apply(Topology(ack_wait=LEASE))
    request = ask("g1", params=SLOW, on_producer_loss="restart")
    async with (
        Broker.connect(f"nats://127.0.0.1:{link.port}", "producer") as far,
        producing(far, lease=LEASE) as late,
    ):
        lane = late._lanes[0]
        earlier = lane._asked_at
        await eventually(lambda: lane._asked_at > earlier and lane._pulling.is_open())  # it waits for half a second
        link.hold()
        await enqueue(broker, request)
        await eventually(lambda: in_delivery(broker))
        async with producing(broker, lease=LEASE):

            async def begun() -> bool:
                return sum(isinstance(e, Delta) for e in await accepted_log(broker, request)) >= 3

            await eventually(begun)
            link.heal()
            events = await ended_log(broker, request)
    assert isinstance(events[-1], Completed)
    assert "restarted" not in map(type_of, events)
    assert await raw_log(broker, request) == events
    assert {event.epoch for event in events} == {2}


async def test_an_event_stored_after_the_lease_expired_raises_fenced(broker: Broker) -> None:
    """Its producer would take the request out of the queue, while another one runs it and is to write the end."""
    publisher = Publisher(broker, give_up=0.2)
    await publisher.start()
    lease = Lease(asyncio.get_running_loop().time() + 60)
    writer = publisher.writer("tokens.0.default.s.g", lease)
    await writer.publish(b"{}")
    await eventually(lambda: not writer.unacknowledged)
    lease.until = 0.0
    with pytest.raises(Fenced):
        await writer.drain()
    writer.close()
