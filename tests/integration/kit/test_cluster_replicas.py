"""Test streams on a cluster: concurrent creation, more replicas, reads through lagging replicas."""

import asyncio

import pytest

from schemas.subjects import Address, log_filter, token_subject
from schemas.topology import BUCKET, REGISTRY_BUCKET, REQUESTS, Topology, bucket_stream, token_stream
from services.kit.jetstream.broker import Broker, BrokerUnavailable, ReadFailed, Stored
from tests.conftest import NatsServer
from tests.support.nats_cluster import Cluster

pytest_plugins = ["tests.support.nats_cluster"]

LOG = token_stream(0)
SUBJECT = token_subject(Address(0, "t", "s", "g"))
EVERY = (LOG, REQUESTS, bucket_stream(BUCKET), bucket_stream(REGISTRY_BUCKET))


async def replicas(broker: Broker, stream: str) -> int | None:
    return (await broker.js.stream_info(stream)).config.num_replicas


async def test_services_that_start_concurrently_create_each_stream_once(cluster: Cluster) -> None:
    topology = Topology(partitions=3, replicas=3)

    async def start(url: str) -> Topology:
        async with Broker.connect(url, "test") as broker:
            return await broker.apply(topology)

    started = await asyncio.gather(*(start(node.url) for node in cluster.nodes for _ in range(2)))
    assert {one.logs for one in started} == {(0, 1, 2)}
    async with Broker.connect(cluster.url, "test") as broker:
        assert await broker.partitions() == [0, 1, 2]
        assert [await replicas(broker, stream) for stream in EVERY] == [3, 3, 3, 3]


async def test_services_that_start_before_the_cluster_has_a_leader_wait_for_it(cluster: Cluster) -> None:
    for node in cluster.nodes:
        node.kill()
    cluster.start()
    async with Broker.connect(cluster.url, "test") as broker:
        await broker.apply(Topology(replicas=3))
        assert await replicas(broker, LOG) == 3


async def test_replicas_of_existing_streams_are_raised_and_messages_are_kept(cluster: Cluster) -> None:
    async with Broker.connect(cluster.url, "test") as broker:
        await broker.apply(Topology(replicas=1))
        seq = await broker.publish_stored(SUBJECT, b"kept")
        created = (await broker.state(LOG)).created
        await broker.apply(Topology(replicas=3))
        assert [await replicas(broker, stream) for stream in EVERY] == [3, 3, 3, 3]
        await cluster.in_step(broker, EVERY)
        assert (await broker.state(LOG)).created == created
        (await cluster.leader(broker, LOG)).kill()
        last = None
        async with asyncio.timeout(40):
            while last is None:
                try:
                    last = await broker.last(LOG, SUBJECT)
                except BrokerUnavailable:
                    await asyncio.sleep(0.2)
        assert (last.seq, last.data) == (seq, b"kept")


async def test_more_replicas_than_a_single_server_supports_are_refused_with_a_reason(own_nats: NatsServer) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        with pytest.raises(BrokerUnavailable, match="needs a cluster"):
            await broker.apply(Topology(replicas=3), wait=5)


async def collected(broker: Broker) -> list[Stored]:
    return [m async for batch in broker.read(LOG, log_filter(0, "t", "s")) for m in batch]


async def test_a_lagging_replica_never_truncates_a_read(cluster: Cluster) -> None:
    """The replica is read while it is frozen and answers as it resumes, in one of five tries with no message."""
    events = 8_000
    async with Broker.connect(cluster.url, "writer") as setup:
        await setup.apply(Topology(replicas=3))
        await cluster.in_step(setup, [LOG])
        follower = (await cluster.followers(setup, LOG))[0]
    async with Broker.connect(cluster.url_without(follower), "writer") as writer:
        for attempt in range(1, 6):
            async with Broker.connect(follower.url, "reader") as reader:
                assert await reader.first(LOG, SUBJECT, 10**9) is None  # the reader has looked the stream up
                follower.pause()
                for number in range(events):
                    await writer.publish(SUBJECT, str(number).encode().ljust(300))
                await writer.publish_stored(SUBJECT, b"last")
                reading = asyncio.create_task(collected(reader))
                await asyncio.sleep(0.1)
                follower.resume()
                whole = await reading
                assert [m.seq for m in whole] == list(range(1, (events + 1) * attempt + 1))


async def test_a_read_from_a_replica_that_stays_behind_fails(cluster: Cluster) -> None:
    async with Broker.connect(cluster.url, "test") as broker:
        await broker.apply(Topology(replicas=3))
        await broker.publish_stored(SUBJECT, b"one")
        real = broker.last

        async def further(stream, filter_):  # type: ignore[no-untyped-def]
            last = await real(stream, filter_)
            return type(last)(last.seq + 1, last.subject, last.data)

        broker.last = further  # type: ignore[method-assign]
        with pytest.raises(ReadFailed, match="a replica is at 1 and the leader at 2"):
            [batch async for batch in broker.read(LOG, SUBJECT)]
