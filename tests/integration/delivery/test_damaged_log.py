"""Test delivery with a damaged log: new events are read, lost ones are reported, no cursor leads to other events."""

import asyncio

import pytest

from schemas.topology import Topology
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.consumer_server import Service, consuming, seqs
from tests.support.delivery_server import Log, delivering, keys, metric, story
from tests.support.store_damage import DAMAGES, LOSING, stream_folder

OLD, NEW = ("g1", "g2", "g3"), ("g4", "g5", "g6", "g7")
SIZE = 50


def damage(server: NatsServer, kind: str, stream: str = "TOKENS_0") -> None:
    server.stop()
    DAMAGES[kind](stream_folder(server.folder, stream))
    server.start()


async def append(url: str, names: tuple[str, ...]) -> None:
    async with Broker.connect(url, "test") as broker:
        log = Log(broker)
        await eventually(broker.partitions)  # a stream that was lost is made anew by a service
        for name in names:
            await log.append(*story(name, SIZE))


async def marked(broker: Broker, seq: int) -> None:
    """Wait until the log's mark names this message."""

    async def is_marked() -> bool:
        stored = await broker.last("KV_registry", "$KV.registry.log.0")
        return stored is not None and b'"seq":%d' % seq in stored.data

    await eventually(is_marked)


@pytest.mark.parametrize("kind", DAMAGES)
async def test_a_cursor_from_before_the_damage_never_leads_to_other_events(own_nats: NatsServer, kind: str) -> None:
    async with delivering(own_nats.url) as stage:
        client = stage.events(**{"from": "start"})
        await append(own_nats.url, OLD)
        async with client.connected() as reader:
            assert await reader.count(len(OLD) * (SIZE + 3))
            await marked(stage.broker, len(client.events))
    cursors = dict(zip(keys(client.events), client.ids, strict=True))
    damage(own_nats, kind)
    async with delivering(own_nats.url) as stage:
        await append(own_nats.url, NEW)
        for had in (("g1", 5), ("g2", 20), ("g2", 40), ("g3", 30), ("g3", SIZE + 2)):
            again = stage.events()
            again.last_id = cursors[had]
            async with again.connected() as reader:
                if reader.status == 410:
                    assert kind not in ("index-missing", "index-garbage", "positions-missing"), "nothing was lost"
                    continue
                expected = [key for name in (*OLD, *NEW) for key in keys(story(name, SIZE))]
                expected = expected[expected.index(had) + 1 :]
                assert await reader.count(len(expected))
                assert keys(again.events) == expected
        fresh = stage.events(**{"from": "start"})
        async with fresh.connected() as reader:
            assert await reader.until(lambda c: ("g7", SIZE + 2) in keys(c.events[-1:]))
        assert [key for key in keys(fresh.events) if key[0] in NEW] == [k for n in NEW for k in keys(story(n, SIZE))]


@pytest.mark.parametrize("kind", ["block-overwritten", "block-truncated", "messages-missing", "stream-missing"])
async def test_a_stream_that_is_open_through_the_damage_ends_with_a_gap(own_nats: NatsServer, kind: str) -> None:
    async with delivering(own_nats.url) as stage:
        await stage.broker.keep(Topology())
        client = stage.events(**{"from": "start"})
        await append(own_nats.url, OLD)
        async with client.connected() as reader:
            assert await reader.count(len(OLD) * (SIZE + 3))
            await marked(stage.broker, len(client.events))
            await asyncio.to_thread(damage, own_nats, kind)
            await append(own_nats.url, NEW)
            async with asyncio.timeout(20):
                await reader.to_the_end()
        assert client.controls[-1][0] == "gap"
        assert keys(client.events) == [k for name in OLD for k in keys(story(name, SIZE))]
        async with client.connected() as reader:
            assert reader.status == 410


@pytest.mark.parametrize("kind", DAMAGES)
async def test_a_durable_consumer_receives_new_events_and_a_gap_for_lost_ones(own_nats: NatsServer, kind: str) -> None:
    async with consuming(own_nats.url) as stage:
        service = await Service(stage).created(max_in_flight=10_000)
        await append(own_nats.url, OLD)
        total = len(OLD) * (SIZE + 3)
        await service.take(total)
        await stage.replica.states.state(0, fresh=True)
        await marked(stage.replica.broker, total)
    damage(own_nats, kind)
    async with consuming(own_nats.url) as stage:
        service = Service(stage)
        if kind in ("stream-missing", "consumer-meta-garbage", "consumers-missing"):
            await service.created(max_in_flight=10_000)  # it was kept with what is gone
        await append(own_nats.url, NEW)
        expected = [key for name in NEW for key in keys(story(name, SIZE))]
        taken: list[dict[str, object]] = []
        async with asyncio.timeout(30):
            while [key for key in seqs(taken) if key in expected] != expected:
                events = await service.batch(wait=2)
                await service.ack(events)
                taken += events
        gaps = [event.get("gap") for event in taken if event.get("gap")]
        if kind in LOSING - {"stream-missing"}:
            assert "log_recreated" in gaps


async def test_events_lost_from_a_log_are_counted(own_nats: NatsServer) -> None:
    async with delivering(own_nats.url) as stage:
        await append(own_nats.url, OLD)
        await stage.replica.states.state(0)
        await stage.replica.states.state(0, fresh=True)
        await marked(stage.broker, 159)
    before = metric("tailrace_log_lost_events_total", partition="0")
    damage(own_nats, "block-truncated")
    async with delivering(own_nats.url) as stage:
        state = await stage.replica.states.state(0)
        assert metric("tailrace_log_lost_events_total", partition="0") == before + state.holes > before
