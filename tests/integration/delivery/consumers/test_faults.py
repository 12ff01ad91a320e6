"""Durable consumers when clients, replicas and the broker die, and when partitions appear."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from bench.processes import free_port
from schemas.topology import Topology, token_stream
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.consumer_server import Service, Stage, consuming, seqs
from tests.support.delivery_server import Log, keys, metric, story
from tests.support.service_processes import REPOSITORY, clean_environment
from tests.support.sse_client import small_buffers


async def test_unacknowledged_events_of_a_dead_client_are_redelivered(nats_url: str, broker: Broker) -> None:
    async with consuming(nats_url) as stage:
        service = await Service(stage).created(ack_wait=1.0)
        await Log(broker).append(*story("g1", 7))
        async with service.stream() as lines:
            events = await lines.some(6)
            await service.ack(events[:4])
        again = await service.take(6)
        assert seqs(again) == keys(story("g1", 7))[4:]
        assert (await service.view())["in_flight"] == 0


async def test_buffered_events_of_a_closed_session_are_redelivered_at_once(nats_url: str, broker: Broker) -> None:
    async with consuming(nats_url) as stage:
        service = await Service(stage).created(ack_wait=600)
        session = await stage.consumers.open("default", "svc")
        await Log(broker).append(*story("g1", 2))
        pulled = await session.pull(2, 5)
        source = session._sources["TOKENS_0"]
        await source.ask(3, 1_000_000)
        await eventually(lambda: len(source.buffer) == 3)
        await session.nack(pulled)
        await session.close()
        assert seqs(await service.take(5, within=10)) == keys(story("g1", 2))


async def test_the_position_outlives_the_broker(own_nats: NatsServer) -> None:
    async with Broker.connect(own_nats.url, "test") as broker, consuming(own_nats.url) as stage:
        log = Log(broker)
        service = await Service(stage).created(ack_wait=2.0)
        await log.append(*story("g1", 3))
        async with service.stream() as lines:
            first = await lines.some(4)
            await service.ack(first)
            own_nats.kill()
            await asyncio.to_thread(own_nats.start)
            await eventually(lambda: broker.is_connected and stage.replica.broker.is_connected, timeout=20)
            await log.append(*story("g2", 1))
            rest: list[tuple[str, int]] = []
            async with asyncio.timeout(30):
                while len(set(rest)) < 6:
                    event = await lines.next()
                    rest += seqs([event])
                    await service.settle(acks=[event["token"]])
        assert set(keys(story("g1", 3))[4:] + keys(story("g2", 1))) <= set(rest)
        assert set(rest) <= set(keys(story("g1", 3)) + keys(story("g2", 1)))

        async def idle() -> bool:  # words that the broker had not kept yet when it was killed are said again
            await service.ack(await service.batch())
            view = await service.view()
            return (view["in_flight"], view["pending"]) == (0, 0)

        await eventually(idle, timeout=20, interval=0.2)


async def test_acknowledgements_refused_during_a_broker_outage_succeed_when_repeated(own_nats: NatsServer) -> None:
    async with Broker.connect(own_nats.url, "test") as broker, consuming(own_nats.url) as stage:
        service = await Service(stage).created(ack_wait=60.0)
        await Log(broker).append(*story("g1", 3))
        first, *rest = await service.batch()
        await service.ack([first])
        words = {"acks": [event["token"] for event in rest]}
        own_nats.kill()
        answer = await stage.http.post(f"{service.path}/acks", json=words)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.json()["detail"] == "the broker cannot be reached"
        await asyncio.to_thread(own_nats.start)
        await eventually(lambda: stage.replica.broker.is_connected, timeout=20)
        answer = await stage.http.post(f"{service.path}/acks", json=words)
        settled = answer.json()
        assert (answer.status_code, settled["settled"] + len(settled["unknown"])) == (200, len(rest))
        again = await service.take(len(settled["unknown"]))  # the broker died before it had kept that they were given
        assert [event["token"] for event in again] == settled["unknown"]


@asynccontextmanager
async def replica(nats_url: str, folder: Path) -> AsyncIterator[tuple[str, subprocess.Popen[bytes]]]:
    """A delivery process of its own."""
    port = free_port()
    env = clean_environment(
        TAILRACE_NATS_URL=nats_url,
        TAILRACE_DELIVERY_PORT=str(port),
        TAILRACE_DATA=str(folder),
        TAILRACE_LOG_FORMAT="json",
    )
    with (folder / f"delivery-{port}.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.delivery"], cwd=REPOSITORY, env=env, stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient() as http:

            async def ready() -> bool:
                assert process.poll() is None, (folder / f"delivery-{port}.log").read_text()
                try:
                    return (await http.get(f"{url}/readyz")).status_code == 200
                except httpx.TransportError:
                    return False

            await eventually(ready, timeout=30, interval=0.1)
        yield url, process
    finally:
        process.kill()
        await asyncio.to_thread(process.wait, 10)


@pytest.mark.acceptance
async def test_a_killed_replica_loses_no_event_and_another_continues(
    nats_url: str, broker: Broker, tmp_path: Path
) -> None:
    log = Log(broker)
    async with (
        replica(nats_url, tmp_path) as (one, process),
        replica(nats_url, tmp_path) as (two, _),
        httpx.AsyncClient(timeout=20) as http,
    ):
        stages = [Stage(url, None, http) for url in (one, two)]  # type: ignore[arg-type]  # only called over HTTP
        doomed, left = (Service(stage) for stage in stages)
        await doomed.created(ack_wait=1.0)
        await log.append(*story("g1", 20))
        async with doomed.stream() as lines:
            await doomed.ack(await lines.some(10))
            os.kill(process.pid, signal.SIGKILL)
        rest = await left.take(13)
        await log.append(*story("g2", 1))
        rest += await left.take(4)
    assert set(seqs(rest)) == set(keys(story("g1", 20))[10:] + keys(story("g2", 1)))


async def test_a_partition_that_appears_is_read_too(nats_url: str, broker: Broker) -> None:
    two = Topology(partitions=2)
    sessions = [f"session-{n}" for n in range(6)]
    async with consuming(nats_url) as stage:
        service = await Service(stage).created(start="new")
        async with service.stream() as lines:
            await eventually(lambda: metric("tailrace_delivery_consumer_sessions") == 1)
            await broker.apply(two)
            logs = [Log(broker, session, two) for session in sessions]
            assert len({log.subject("g").split(".")[1] for log in logs}) == 2
            for log in logs:
                await log.append(*story(f"{log.session}-g", 1))
            events = await lines.some(4 * len(sessions))
            await service.ack(events)
        wanted = [key for session in sessions for key in keys(story(f"{session}-g", 1))]
        assert sorted(seqs(events)) == sorted(wanted)
        for session in sessions:  # in order within each session
            own = [key for key in seqs(events) if key[0] == f"{session}-g"]
            assert own == keys(story(f"{session}-g", 1))
        assert [p["partition"] for p in (await service.view())["position"]] == [0, 1]


async def test_pause_and_in_flight_limit_apply_to_every_partition(nats_url: str, broker: Broker) -> None:
    topology = Topology(partitions=2)
    await broker.apply(topology)
    async with consuming(nats_url, topology=topology) as stage:
        service = await Service(stage).created(max_in_flight=4)
        assert (await stage.http.post(f"{service.path}/pause")).json()["paused"]
        for n in range(4):
            await Log(broker, f"session-{n}", topology).append(*story(f"g{n}", 5))
        assert await service.batch() == []
        assert (await stage.http.post(f"{service.path}/resume")).status_code == 200
        assert len(await service.batch()) == 4
        view = await service.view()
        assert (view["in_flight"], [p["in_flight"] for p in view["position"]]) == (4, [2, 2])


async def test_batches_over_several_partitions_never_exceed_the_requested_size(nats_url: str, broker: Broker) -> None:
    topology = Topology(partitions=4)
    await broker.apply(topology)
    async with consuming(nats_url, topology=topology) as stage:
        service = await Service(stage).created()
        for n in range(8):
            await Log(broker, f"session-{n}", topology).append(*story(f"g{n}", 5))
        taken: list[dict[str, object]] = []
        while events := await service.batch(batch=3):
            assert len(events) <= 3
            taken += events
        # What came from one partition too many goes back at once, and counts as given then, but nobody has seen it.
        assert len(taken) == len({str(e["cursor"]) for e in taken}) == 64


async def test_a_partly_created_consumer_is_completed_on_the_next_request(nats_url: str, broker: Broker) -> None:
    topology = Topology(partitions=2)
    await broker.apply(topology)
    async with consuming(nats_url, topology=topology) as stage:
        service = await Service(stage).created()
        for stream in ("TOKENS_1", "CONSUMERS"):
            await broker.js.delete_consumer(stream, "svc-7-default-svc")
        assert len((await service.view())["position"]) == 2
        assert {c.name for c in await broker.js.consumers_info("TOKENS_1")} == {"billing-1", "svc-7-default-svc"}


async def test_a_partly_removed_consumer_is_removed_on_the_next_request(nats_url: str, broker: Broker) -> None:
    topology = Topology(partitions=2)
    await broker.apply(topology)
    async with consuming(nats_url, topology=topology) as stage:
        service = await Service(stage).created()
        consumers = stage.consumers
        found = await consumers.get("default", "svc")
        doomed = found.definition.__class__(spec=found.definition.spec, revision=9, deleted=True)
        await consumers._change("default", "svc", doomed, 1, found.infos[1], 2)
        assert (await stage.http.get(service.path)).status_code == 404
        for stream in (token_stream(0), token_stream(1), "CONSUMERS"):
            assert "svc-7-default-svc" not in {c.name for c in await broker.js.consumers_info(stream)}


async def test_a_recreated_log_is_read_from_its_beginning(nats_url: str, broker: Broker) -> None:
    async with consuming(nats_url) as stage:
        log = Log(broker)
        service = await Service(stage).created()
        await log.append(*story("g1", 1))
        (token, *_) = [e["token"] for e in await service.batch()]
        await broker.js.delete_stream("TOKENS_0")
        await broker.apply(Topology())
        await log.append(*story("g2", 1))

        async def known() -> bool:
            return bool((await service.settle(acks=[token]))["unknown"] == [token])

        await eventually(known)
        assert seqs(await service.take(4)) == keys(story("g2", 1))


async def test_a_stalled_client_uses_bounded_memory_and_is_evicted(nats_url: str, broker: Broker) -> None:
    async with consuming(nats_url, stall=1.0) as stage, small_buffers() as slow:
        service = await Service(stage).created(max_in_flight=10_000)
        await Log(broker).append(*story("g1", 300, size=60_000))
        stuck = Service(Stage(stage.url, stage.replica, slow))
        worst, before = 0, metric("tailrace_delivery_streams_closed_total", reason="evicted")
        async with stuck.stream():
            (session,) = stage.consumers._sessions

            def evicted() -> bool:
                nonlocal worst
                worst = max(worst, sum(len(data) for s in session._sources.values() for _, _, data in s.buffer))
                return metric("tailrace_delivery_streams_closed_total", reason="evicted") > before

            await eventually(evicted, timeout=20)
        assert worst < 2 * 1024 * 1024
        await eventually(lambda: metric("tailrace_delivery_consumer_sessions") == 0)
        assert (await service.view())["in_flight"] > 0  # what it was given comes again to others
