"""Test delivery reports on SQLite and PostgreSQL."""

import asyncio

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from schemas.delivered import DeliveredReport, delivered_subject, encode_delivered
from schemas.events import Completed
from schemas.topology import Topology
from services.billing.adapters.deliveries import Deliveries
from services.billing.adapters.ledger import Ledger
from services.billing.core.generation import Key
from services.billing.deliveries import DeliveryReports
from services.kit.jetstream.broker import Broker
from tests.conftest import eventually
from tests.contracts.billing.test_ledger import NOW, generation
from tests.support.billing_database import database, engine, postgres_server, postgres_url

__all__ = ["database", "engine", "postgres_server", "postgres_url"]


def report(counter: str = "a-1", number: int = 1, generation: str = "g", **counts: int) -> DeliveredReport:
    given = {"subscribers": 1, "events": 3, "tokens": 30, "sent_tokens": 30, "bytes": 100} | counts
    place = {"tenant": "default", "session": "s", "generation": generation}
    return DeliveredReport(**place, counter=counter, number=number, at=1.5, **given)  # type: ignore[arg-type]


@pytest.fixture
async def ledger(engine: AsyncEngine) -> Ledger:
    made = Ledger(engine, "test")
    await made.acquire(0, "first", NOW)
    return made


async def delivered(ledger: Ledger, name: str = "g") -> tuple[int | None, ...]:
    key = Key("default", "s", name)
    g = (await ledger.load([key]))[key]
    return (g.subscribers, g.delivered_events, g.delivered_tokens, g.delivered_bytes)


async def test_counters_are_summed_and_tokens_are_the_maximum_of_all_subscribers(ledger: Ledger) -> None:
    await ledger.commit(0, (0, 1), NOW, [generation()])
    assert await delivered(ledger) == (None, None, None, None)
    deliveries = Deliveries(ledger.engine)
    await deliveries.put([report(), report("b-1", tokens=50, subscribers=2)])
    assert await deliveries.update_generations() == 1
    assert await delivered(ledger) == (3, 6, 50, 200)
    assert await deliveries.update_generations() == 0


async def test_the_newest_report_of_a_counter_wins_in_any_order(ledger: Ledger) -> None:
    await ledger.commit(0, (0, 1), NOW, [generation()])
    deliveries = Deliveries(ledger.engine)
    await deliveries.put([report(number=3, events=9), report(number=2, events=5)])
    await deliveries.put([report(number=1), report(number=2, events=5), report(number=3, events=9)])
    await deliveries.update_generations()
    assert await delivered(ledger) == (1, 9, 30, 100)


async def test_a_report_before_its_generation_is_applied_later(ledger: Ledger) -> None:
    deliveries = Deliveries(ledger.engine)
    await deliveries.put([report()])
    assert await deliveries.update_generations() == 0
    await ledger.commit(0, (0, 1), NOW, [generation()])
    assert await deliveries.update_generations() == 1
    assert (await delivered(ledger))[0] == 1


async def test_rewriting_a_generation_keeps_its_delivery_counts(ledger: Ledger) -> None:
    await ledger.commit(0, (0, 1), NOW, [generation(terminal=None)])
    deliveries = Deliveries(ledger.engine)
    await deliveries.put([report()])
    await deliveries.update_generations()
    await ledger.commit(0, (1, 2), NOW, [generation(terminal=Completed)])
    assert await delivered(ledger) == (1, 3, 30, 100)


async def test_several_writers_at_once_lose_no_report(ledger: Ledger) -> None:
    await ledger.commit(0, (0, 1), NOW, [generation(f"g{n}") for n in range(20)])

    async def writer(counter: str) -> None:
        deliveries = Deliveries(ledger.engine)
        for number in range(1, 6):
            await deliveries.put([report(counter, number, f"g{n}", events=number) for n in range(20)])
            await deliveries.update_generations()

    await asyncio.gather(*(writer(f"w-{n}") for n in range(3)))
    await Deliveries(ledger.engine).update_generations()
    for n in range(20):
        assert await delivered(ledger, f"g{n}") == (3, 15, 30, 300)


async def test_reports_are_consumed_from_the_broker(broker: Broker, ledger: Ledger) -> None:
    await ledger.commit(0, (0, 1), NOW, [generation()])
    stop = asyncio.Event()
    running = asyncio.create_task(DeliveryReports(broker, Deliveries(ledger.engine), Topology().delivered()).run(stop))
    try:
        subject = delivered_subject("default", "s", "g")
        await broker.publish_stored(subject, b"not a report")
        for number in (1, 2):
            await broker.publish_stored(subject, encode_delivered(report(number=number, events=number)))

        async def taken() -> bool:
            return await delivered(ledger) == (1, 2, 30, 100)

        await eventually(taken)

        async def acknowledged() -> bool:
            info = await broker.js.consumer_info("DELIVERED", "billing-delivered")
            return bool(info.num_pending == 0 and info.num_ack_pending == 0)

        await eventually(acknowledged)
    finally:
        stop.set()
        await asyncio.wait_for(running, 10)
