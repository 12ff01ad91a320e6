"""Test billing's consumer between a real broker and real databases, during outages of either."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY

from schemas.events import UsageReported
from schemas.subjects import token_subject
from schemas.topology import Topology
from schemas.usage import Usage
from services.billing.adapters.database import open_engine, writing
from services.billing.adapters.reports import Reports
from services.billing.core.question import Filters
from services.billing.core.reconciliation import Policy
from services.billing.database_url import database_url
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, empty, eventually
from tests.support.billing_histories import history
from tests.support.billing_process import Scenario, place, running, sqlite, write, write_surely
from tests.support.postgres import PostgresServer, postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return sqlite(tmp_path) if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))


async def consumer_info(broker: Broker):  # type: ignore[no-untyped-def]
    return await broker.js.consumer_info("TOKENS_0", "billing-0")


async def test_every_generation_is_settled_and_every_event_acknowledged(broker: Broker, database: str) -> None:
    scenario = Scenario(1)
    await write(broker, scenario.events[:300])
    async with running(broker, database) as run:
        await write(broker, scenario.events[300:])
        await eventually(lambda: scenario.settled(run.reports))

        async def acknowledged() -> bool:
            info = await consumer_info(broker)
            return bool(info.num_ack_pending == 0 and info.num_pending == 0)

        await eventually(acknowledged)
    totals = await totals_of(database)
    assert totals.generations == len(scenario.expected)
    assert totals.counted_output == sum(counted for _, counted, _ in scenario.expected.values())


async def totals_of(url: str):  # type: ignore[no-untyped-def]
    async with open_engine(database_url(url)) as engine:
        return await Reports(engine).totals(Filters(tenant="default"))


async def test_counts_run_while_a_generation_streams(broker: Broker, tmp_path: Path) -> None:
    events = history("gen_1", deltas=20, at=1.0)
    async with running(broker, sqlite(tmp_path)) as run:
        for upto in (5, 12):
            await write(broker, events[:upto])

            async def counted(expected: int = (upto - 1) * 10) -> bool:
                g = await run.reports.generation("default", "gen_1")
                return g is not None and (g.status, g.counted_output) == ("running", expected)

            await eventually(counted)


async def test_a_provider_that_never_reports_is_missing_after_its_grace(broker: Broker, tmp_path: Path) -> None:
    async with running(broker, sqlite(tmp_path), policy=Policy(grace=3.0)) as run:
        events = history("gen_1", at=time.time() - 3)
        await write(broker, events)

        async def status(expected: str) -> bool:
            g = await run.reports.generation("default", "gen_1")
            return g is not None and g.status == expected

        await eventually(lambda: status("awaiting_provider"))
        await eventually(lambda: status("provider_missing"))
        late = UsageReported(generation="gen_1", seq=len(events), usage=Usage(input=7, output=30))
        await write(broker, [late])
        await eventually(lambda: status("matched"))


async def test_everything_redelivered_changes_nothing(broker: Broker, tmp_path: Path) -> None:
    scenario = Scenario(2)
    await write(broker, scenario.events)
    async with running(broker, sqlite(tmp_path)) as run:
        await eventually(lambda: scenario.settled(run.reports))
        before = await run.reports.generations(Filters(), None, 1_000)
    await broker.js.delete_consumer("TOKENS_0", "billing-0")
    await broker.apply(Topology())
    async with running(broker, sqlite(tmp_path)) as run:

        async def acknowledged() -> bool:
            info = await consumer_info(broker)
            return bool(info.ack_floor.stream_seq == len(scenario.events))

        await eventually(acknowledged)
        assert await run.reports.generations(Filters(), None, 1_000) == before


async def test_messages_delivered_to_a_dead_process_are_read_from_the_log_at_once(
    broker: Broker, tmp_path: Path
) -> None:
    scenario = Scenario(3)
    await write(broker, scenario.events)
    thief = await broker.js.pull_subscribe_bind("billing-0", "TOKENS_0")
    taken = 0
    while taken < 200:  # never acknowledged; comes again after 30 s
        taken += len(await thief.fetch(200 - taken, timeout=5))
    async with running(broker, sqlite(tmp_path)) as run:
        await eventually(lambda: scenario.settled(run.reports))


async def test_another_reader_of_the_same_consumer_causes_no_loss(broker: Broker, tmp_path: Path) -> None:
    scenario = Scenario(4)
    thief = await broker.js.pull_subscribe_bind("billing-0", "TOKENS_0")
    async with running(broker, sqlite(tmp_path)) as run:
        for start in range(0, len(scenario.events), 50):
            await write(broker, scenario.events[start : start + 50])
            for message in await thief.fetch(10, timeout=1) if start % 100 == 0 else []:
                await message.ack()
        await write(broker, [])
        last = history("gen_last")
        await write(broker, last)  # a hole shows when something behind it is delivered
        await eventually(lambda: scenario.settled(run.reports))


async def test_malformed_and_unknown_events_are_skipped(broker: Broker, tmp_path: Path) -> None:
    events = history("gen_1", reported=Usage(input=7, output=30))
    async with running(broker, sqlite(tmp_path)) as run:
        await write(broker, events[:2])
        subject = token_subject(place("gen_1"))
        for junk in (
            b"",
            b"\xff\xfe",
            b"[1]",
            b'{"type":"delta","seq":-1}',
            b'{"type":"nova","generation":"x","seq":9}',
        ):
            await broker.publish(subject, junk)
            await broker.publish("tokens.0.a!b.c~d.e", junk)
        await write(broker, events[2:])

        async def settled() -> bool:
            g = await run.reports.generation("default", "gen_1")
            return g is not None and g.status == "matched"

        await eventually(settled)
        assert (await run.reports.totals(Filters())).generations == 1


async def test_a_recreated_stream_is_noticed_and_read_from_its_beginning(broker: Broker, tmp_path: Path) -> None:
    first, second = Scenario(5, 10), Scenario(6, 10)
    async with running(broker, sqlite(tmp_path)) as run:
        await write(broker, first.events)
        await eventually(lambda: first.settled(run.reports))
        await empty(broker)
        await broker.apply(Topology())
        await write(broker, second.events)
        await eventually(lambda: second.settled(run.reports))
        assert await first.settled(run.reports)


async def test_the_broker_restarted_mid_stream_loses_nothing(own_nats: NatsServer, tmp_path: Path) -> None:
    scenario = Scenario(7)
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology())
        async with running(broker, sqlite(tmp_path)) as run:
            writer = asyncio.create_task(write_surely(broker, scenario.events))
            for _restart in range(2):
                before = run.consumer.applied
                await eventually(lambda before=before: run.consumer.applied > before + 50)
                own_nats.stop()
                own_nats.start()
            await asyncio.wait_for(writer, 30)
            await eventually(lambda: scenario.settled(run.reports), timeout=20)


async def test_two_processes_at_once_write_each_number_once(
    broker: Broker, nats_url: str, database: str, tmp_path: Path
) -> None:
    scenario = Scenario(8)
    async with Broker.connect(nats_url, "second") as other, running(broker, database, holder="one") as one:
        async with running(other, database, holder="two") as two:
            await write(broker, scenario.events[:300])
            await eventually(lambda: max(one.consumer.applied, two.consumer.applied) >= 300, timeout=30)
            assert min(one.consumer.applied, two.consumer.applied) <= 0  # one reads, the other waits
        await write(broker, scenario.events[300:])
        await eventually(lambda: scenario.settled(one.reports), timeout=30)


async def test_a_database_locked_by_another_is_waited_for(broker: Broker, tmp_path: Path) -> None:
    scenario = Scenario(9)
    async with running(broker, sqlite(tmp_path)) as run:
        await write(broker, scenario.events[:100])
        await eventually(lambda: run.consumer.applied >= 100)
        async with writing(run.ledger.engine) as connection:
            await connection.execute(sa.text("SELECT 1"))
            await write(broker, scenario.events[100:])

            async def waiting() -> bool:
                info = await consumer_info(broker)
                return bool(info.num_pending + info.num_ack_pending > 0)

            await eventually(waiting)
        await eventually(lambda: scenario.settled(run.reports))


@pytest.fixture
def own_postgres(postgres_server: PostgresServer) -> Iterator[PostgresServer]:
    yield postgres_server
    if postgres_server.process is None:
        postgres_server.start()


@pytest.mark.postgres
async def test_no_event_is_acknowledged_during_a_database_outage(broker: Broker, own_postgres: PostgresServer) -> None:
    scenario = Scenario(10)
    async with running(broker, own_postgres.url) as run:
        await write(broker, scenario.events[:200])
        await eventually(lambda: run.consumer.applied >= 200)
        await eventually(lambda: floor(broker, 200))
        before = stalls()
        own_postgres.stop()
        await write(broker, scenario.events[200:])
        await eventually(lambda: stalls() > before + 1)
        assert not await floor(broker, 201)
        own_postgres.start()
        await eventually(lambda: scenario.settled(run.reports), timeout=30)


def stalls() -> float:
    return REGISTRY.get_sample_value("tailrace_billing_stalls_total", {"part": "database"}) or 0.0


async def floor(broker: Broker, seq: int) -> bool:
    return bool((await consumer_info(broker)).ack_floor.stream_seq >= seq)
