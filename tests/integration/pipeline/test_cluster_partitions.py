"""The number of partitions changes: sessions stay readable and writable, and billing reads every log there is."""

import asyncio
from pathlib import Path

from bench.processes import free_port
from schemas.partitions import candidates
from schemas.topology import Topology, token_stream
from services.delivery.log.partitions import Partitions
from services.kit.clock import SystemClock
from services.kit.jetstream.broker import Broker
from services.kit.settings import Shared
from tests.conftest import eventually
from tests.support.delivery_server import Stage, delivering
from tests.support.producer_worker import producing
from tests.support.service_processes import clean_environment, service
from tests.support.sse_client import SseClient

TENANT = "default"


def moving(before: int, after: int) -> str:
    """A session whose partition differs between two counts."""
    names = (f"s{n}" for n in range(1_000))
    return next(name for name in names if len(candidates(TENANT, name, (before, after))) == 2)


async def answered(stage: Stage, session: str, count: int) -> SseClient:
    """Ask once, and read the whole session until so many answers have ended."""
    body = {
        "model": "scripted/story",
        "messages": [{"role": "user", "content": "rivers"}],
        "params": {"tokens": 20, "tokens_per_second": 0},
    }
    answer = await stage.http.post(f"{stage.url}/v1/sessions/{session}/generations", json=body)
    assert answer.status_code == 202, answer.text
    client = stage.events(session, **{"from": "start"})
    async with asyncio.timeout(20):
        await client.follow(lambda c: sum(e["type"] == "completed" for e in c.events) == count)
    return client


async def test_sessions_stay_where_their_events_are_until_these_have_expired(broker: Broker, nats_url: str) -> None:
    session = moving(1, 4)
    wanted = candidates(TENANT, session, (1, 4))[0]
    async with producing(broker):
        async with delivering(nats_url) as stage:
            first = await answered(stage, session, 1)
        async with delivering(nats_url, shared=Shared(nats_url=nats_url, partitions=4)) as stage:
            second = await answered(stage, session, 2)  # the old answer and the new one, in one log
            assert second.events[: len(first.events)] == first.events
            assert second.ids[: len(first.ids)] == first.ids
            assert (await broker.state(token_stream(wanted))).last_seq == 0
            described = await stage.http.get(f"{stage.url}/v1/sessions/{session}/generations/{_newest(second)}")
            assert described.json()["state"] == "completed"
            assert described.json()["text"]

            fresh = moving(1, 4) + "x"
            await answered(stage, fresh, 1)
            home = candidates(TENANT, fresh, (1, 4))[0]
            assert (await broker.state(token_stream(home))).last_seq > 0

            await broker.js.purge_stream(token_stream(0))  # as after the retention time
            async with delivering(nats_url, shared=Shared(nats_url=nats_url, partitions=4)) as other:
                third = await answered(other, session, 1)
                assert (await broker.state(token_stream(wanted))).last_seq > 0
                expired = await other.http.get(
                    f"{other.url}/v1/sessions/{session}/events", headers={"Last-Event-ID": first.ids[-1]}
                )
                assert expired.status_code == 410
            assert _newest(third) != _newest(second)


async def test_a_running_replica_notices_the_change_and_closes_feeds_of_moved_sessions(
    broker: Broker, nats_url: str
) -> None:
    session = moving(1, 4)
    async with producing(broker), delivering(nats_url) as old:
        client = old.events(session, **{"from": "start"})
        following = asyncio.create_task(client.follow(lambda c: bool(c.events) and c.events[-1]["type"] == "completed"))
        try:
            await eventually(lambda: len(old.replica.feeds._feeds) == 1)  # follows a session of which nothing is stored
            async with delivering(nats_url, shared=Shared(nats_url=nats_url, partitions=4)) as new:
                await answered(new, session, 1)
                async with asyncio.timeout(20):
                    await following  # it was told, came back, and found the answer where it is now
        finally:
            following.cancel()


async def test_concurrent_starts_keep_the_history_of_partition_counts(broker: Broker) -> None:
    partitions = Partitions(broker, SystemClock(), 7)
    assert await partitions.history() == (1,)
    for count, expected in ((4, (1, 4)), (4, (1, 4)), (2, (1, 4, 2)), (1, (4, 2, 1))):
        await asyncio.gather(*(broker.apply(Topology(partitions=count)) for _ in range(3)))
        assert await Partitions(broker, SystemClock(), 7).history() == expected
    topology = await broker.apply(Topology(partitions=2))
    assert topology.logs == (0, 1, 2, 3)  # none is ever deleted
    assert await broker.partitions() == [0, 1, 2, 3]
    billing = [c.durable for c in topology.consumers() if c.durable[-1].isdigit() and c.durable.startswith("billing-")]
    assert billing == ["billing-0", "billing-1", "billing-2", "billing-3"]


async def test_the_first_history_starts_with_the_existing_partition_count(broker: Broker) -> None:
    await broker.apply(Topology(partitions=3))
    await broker.js.purge_stream("KV_registry")
    await broker.apply(Topology(partitions=5))
    assert await Partitions(broker, SystemClock(), 7).history() == (3, 5)


async def test_billing_reads_partitions_beyond_its_configured_number_and_those_added_later(
    broker: Broker, nats_url: str, tmp_path: Path
) -> None:
    first, later = moving(1, 4), moving(4, 9) + "later"
    env = clean_environment(TAILRACE_NATS_URL=nats_url, TAILRACE_DATA=str(tmp_path), TAILRACE_PARTITIONS="1")
    async with producing(broker):
        async with delivering(nats_url, shared=Shared(nats_url=nats_url, partitions=4)) as stage:
            one = await answered(stage, first, 1)
        with service("billing", free_port(), env, tmp_path) as billing:
            async with delivering(nats_url, shared=Shared(nats_url=nats_url, partitions=9)) as stage:
                two = await answered(stage, later, 1)
                for client in (one, two):
                    usage = f"{billing}/v1/usage/generations/{_newest(client)}"
                    await eventually(lambda u=usage: _is_there(stage, u), timeout=30, interval=0.2)


async def _is_there(stage: Stage, url: str) -> bool:
    return (await stage.http.get(url)).status_code == 200


def _newest(client: SseClient) -> str:
    return str(client.events[-1]["generation"])
