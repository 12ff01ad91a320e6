"""Test reports of events sent to subscribers, from memory and from the log."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from schemas.codec import encode_event
from schemas.delivered import DELIVERED_FILTER, DeliveredReport, decode_delivered
from schemas.topology import DELIVERED
from services.delivery.reports.reporter import DeliveryReporter
from services.kit.jetstream.broker import Broker
from tests.conftest import eventually
from tests.support.delivery_server import Log, Stage, delivering, story


@pytest.fixture
async def log(broker: Broker) -> Log:
    return Log(broker)


@pytest.fixture
async def stage(nats_url: str, broker: Broker) -> AsyncIterator[Stage]:
    def counts(broker: Broker) -> DeliveryReporter:
        return DeliveryReporter(broker.publish_stored, "replica")

    async with delivering(nats_url, counts=counts, linger=60.0) as made:
        yield made


async def reported(stage: Stage, broker: Broker, generation: str) -> DeliveredReport | None:
    """Report, and return the newest word on a generation, summed over its counters."""
    assert stage.counts is not None
    await stage.counts.report()
    newest: dict[str, DeliveredReport] = {}
    async for batch in broker.read(DELIVERED, DELIVERED_FILTER):
        for stored in batch:
            report = decode_delivered(stored.data)
            if report.generation == generation:
                newest[report.counter] = report
    return next(iter(newest.values()), None)


@pytest.mark.parametrize("source", ["memory", "log"])
async def test_events_sent_to_several_subscribers_are_reported(
    stage: Stage, broker: Broker, log: Log, source: str
) -> None:
    events = story("g1", 20)
    if source == "log":
        await log.append(*events)
        await log.append(*story("g2", 3))
    readers = [stage.events(generation="g1") for _ in range(3)]

    async def read(reader) -> None:  # type: ignore[no-untyped-def]
        async with asyncio.timeout(20):
            await reader.read_all()

    tasks = [asyncio.create_task(read(reader)) for reader in readers]
    if source == "memory":
        await log.append(events[0])
        await eventually(
            lambda: stage.replica.feeds._feeds and sum(len(f.everyone()) for f in stage.replica.feeds.all()) == 3
        )
        await log.append(*events[1:])
    await asyncio.gather(*tasks)
    await stage.settled()
    report = await reported(stage, broker, "g1")
    assert report is not None
    assert (report.subscribers, report.events, report.tokens) == (3, 3 * len(events), 20)
    assert report.sent_tokens == 60
    assert report.bytes == 3 * sum(len(encode_event(event)) for event in events)


async def test_a_resumed_subscriber_is_counted_only_for_the_remaining_events(
    stage: Stage, broker: Broker, log: Log
) -> None:
    events = story("g1", 20)
    await log.append(*events)
    async with asyncio.timeout(20):
        whole = stage.events(generation="g1")
        await whole.read_all()
        rest = stage.events(generation="g1", after=whole.ids[10])
        await rest.read_all()
    await stage.settled()
    report = await reported(stage, broker, "g1")
    assert report is not None
    assert (report.subscribers, report.events, report.tokens) == (2, len(events) + len(events) - 11, 20)


async def test_an_open_session_stream_is_reported_while_it_is_read(stage: Stage, broker: Broker, log: Log) -> None:
    async with stage.events().connected() as connection:
        await log.append(*story("g1", 5), *story("g2", 7))
        async with asyncio.timeout(20):
            assert await connection.count(len(story("g1", 5)) + len(story("g2", 7)))
            first = second = None
            while first is None or second is None or second.events < len(story("g2", 7)):
                first, second = await reported(stage, broker, "g1"), await reported(stage, broker, "g2")
                await asyncio.sleep(0.2)
    assert (first.subscribers, first.tokens) == (1, 5)
    assert (second.subscribers, second.tokens) == (1, 7)
