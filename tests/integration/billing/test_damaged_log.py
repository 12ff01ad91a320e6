"""Test billing with a damaged log: later events are billed and lost events are reported."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from schemas.topology import Topology
from schemas.usage import Usage
from services.billing.adapters.database import open_engine, reading
from services.billing.adapters.tables import GAPS
from services.billing.database_url import database_url
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.billing_histories import history
from tests.support.billing_process import Run, running, sqlite, write_surely
from tests.support.delivery_server import metric
from tests.support.store_damage import DAMAGES, LOSING, stream_folder

OLD, NEW = ("gen_1", "gen_2", "gen_3"), ("gen_4", "gen_5", "gen_6")


async def append(broker: Broker, names: tuple[str, ...], deltas: int = 50) -> None:
    for name in names:
        await write_surely(broker, history(name, deltas=deltas, reported=Usage(input=7, output=10 * deltas)))


async def are_billed(run: Run, names: tuple[str, ...], output: int = 500) -> None:
    async def settled() -> bool:
        found = [await run.reports.generation("default", name) for name in names]
        return all(g is not None and (g.status, g.counted_output) == ("matched", output) for g in found)

    await eventually(settled, timeout=20)


async def before_the_damage(server: NatsServer, url: str) -> None:
    async with Broker.connect(server.url, "test") as broker:
        await broker.apply(Topology())
        async with running(broker, url) as run:
            await append(broker, OLD)
            await are_billed(run, OLD)


def damage(server: NatsServer, kind: str) -> None:
    server.stop()
    DAMAGES[kind](stream_folder(server.folder))
    server.start()


@pytest.mark.parametrize("kind", DAMAGES)
async def test_events_written_after_damage_are_billed(own_nats: NatsServer, tmp_path: Path, kind: str) -> None:
    url = sqlite(tmp_path)
    await before_the_damage(own_nats, url)
    damage(own_nats, kind)
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology())
        async with running(broker, url) as run:
            await append(broker, NEW)
            await are_billed(run, NEW)
            await are_billed(run, OLD)
            state = await broker.state("TOKENS_0")
            assert run.consumer.applied == state.last_seq


@pytest.mark.parametrize("kind", sorted(LOSING))
async def test_events_with_reused_stream_sequences_are_billed(own_nats: NatsServer, tmp_path: Path, kind: str) -> None:
    url = sqlite(tmp_path)
    await before_the_damage(own_nats, url)
    damage(own_nats, kind)
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology())
        await append(broker, NEW)
        async with running(broker, url) as run:
            await are_billed(run, NEW)
            await are_billed(run, OLD)


@pytest.mark.parametrize("kind", ["block-overwritten", "messages-missing", "stream-missing", "consumers-missing"])
async def test_running_billing_continues_after_damage(own_nats: NatsServer, tmp_path: Path, kind: str) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.keep(Topology())
        async with running(broker, sqlite(tmp_path)) as run:
            await append(broker, OLD)
            await are_billed(run, OLD)
            damage(own_nats, kind)
            await append(broker, NEW)
            await are_billed(run, NEW)
            await are_billed(run, OLD)


async def test_events_lost_from_a_log_are_recorded_as_a_gap_and_counted(own_nats: NatsServer, tmp_path: Path) -> None:
    url = sqlite(tmp_path)
    await before_the_damage(own_nats, url)
    regressions = metric("tailrace_log_regressions_total", partition="0")
    damage(own_nats, "block-overwritten")
    async with Broker.connect(own_nats.url, "test") as broker:
        kept = (await broker.state("TOKENS_0")).last_seq
        assert kept < 156
        async with running(broker, url) as run:
            await append(broker, NEW)
            await are_billed(run, NEW)
    assert metric("tailrace_log_regressions_total", partition="0") == regressions + 1
    async with open_engine(database_url(url)) as engine, reading(engine) as connection:
        gap = (await connection.execute(sa.select(GAPS.c.first, GAPS.c.last))).one()
    assert tuple(gap) == (kept + 1, 159)


async def test_events_lost_in_the_middle_before_they_were_read_are_a_gap(own_nats: NatsServer, tmp_path: Path) -> None:
    url = sqlite(tmp_path)
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology())
        await append(broker, OLD)
    damage(own_nats, "block-truncated")
    unread = metric("tailrace_billing_gap_events_total", partition="0")
    async with Broker.connect(own_nats.url, "test") as broker:
        state = await broker.state("TOKENS_0")
        assert (state.last_seq, state.holes > 0) == (159, True)
        async with running(broker, url) as run:
            await append(broker, NEW)
            await are_billed(run, NEW)
            await eventually(lambda: run.consumer.applied == 318)
    assert metric("tailrace_billing_gap_events_total", partition="0") == unread + state.holes


async def test_a_generation_with_a_lost_terminal_is_closed_as_interrupted(
    own_nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.billing.adapters.ledger.UNHEARD", 500)
    url = sqlite(tmp_path)
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology())
        async with running(broker, url) as run:
            await write_surely(broker, history("gen_1", deltas=50, terminal=None))
            await eventually(lambda: run.consumer.applied == 51)
    damage(own_nats, "block-overwritten")
    async with Broker.connect(own_nats.url, "test") as broker, running(broker, url) as run:
        await append(broker, NEW)
        await are_billed(run, NEW)

        async def closed() -> bool:
            g = await run.reports.generation("default", "gen_1")
            return g is not None and (g.state, g.code) == ("interrupted", "log_expired")

        await eventually(closed, timeout=20)
