"""Test running answers under broker faults: identical text, no lost or repeated event, one terminal."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from schemas.codec import encode_event
from schemas.events import Delta
from schemas.subjects import Address, token_subject
from schemas.topology import REQUESTS, token_stream
from services.kit.jetstream.broker import Broker
from services.kit.settings import Shared
from tests.conftest import eventually
from tests.support.delivery_server import Stage, delivering
from tests.support.nats_cluster import Cluster
from tests.support.producer_worker import producing
from tests.support.sse_client import SseClient

pytest_plugins = ["tests.support.nats_cluster"]

LOG = token_stream(0)
TERMINALS = {"completed", "failed", "cancelled", "interrupted"}
LEASE = 15.0  # the default: an election takes 4 to 9 s
RIDE = 90.0


def whole(client: SseClient) -> bool:
    return bool(client.events) and client.events[-1]["type"] in TERMINALS


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event.get("text", "") for event in events if event["type"] == "delta")


@asynccontextmanager
async def pipeline(cluster: Cluster, url: str | None = None) -> AsyncIterator[Stage]:
    """A producer and a delivery on the cluster, or on the servers at ``url`` alone."""
    url = url or cluster.url
    shared = Shared(nats_url=url, replicas=3, lease=LEASE)
    async with (
        Broker.connect(url, "test-producer") as broker,
        delivering(url, shared=shared) as stage,
        producing(broker, lease=LEASE),
    ):
        await cluster.in_step(broker, [LOG, REQUESTS])
        yield stage


async def asked(stage: Stage, session: str, *, tokens: int = 150, speed: float = 0) -> str:
    body = {
        "model": "scripted/story",
        "messages": [{"role": "user", "content": "rivers"}],
        "params": {"tokens": tokens, "tokens_per_second": speed},
    }

    async def accepted() -> str | None:
        answer = await stage.http.post(f"{stage.url}/v1/sessions/{session}/generations", json=body, timeout=20)
        return str(answer.json()["generation"]) if answer.status_code == 202 else None

    generation: str = await eventually(accepted, timeout=RIDE, interval=0.5)
    return generation


async def undisturbed(stage: Stage) -> str:
    """The text that the same question has without any fault."""
    await asked(stage, "undisturbed")
    client = stage.events("undisturbed", **{"from": "start"})
    async with asyncio.timeout(RIDE):
        await client.follow(whole)
    return text_of(client.events)


async def restart_all(cluster: Cluster, _stage: Stage) -> None:
    for node in cluster.nodes:
        node.kill()
    cluster.start()


async def step_down(cluster: Cluster, stage: Stage) -> None:
    await cluster.step_down(stage.broker, LOG)


async def kill_the_leader_of_the_log(cluster: Cluster, stage: Stage) -> None:
    (await cluster.leader(stage.broker, LOG)).kill()


async def kill_the_leader_of_the_queue(cluster: Cluster, stage: Stage) -> None:
    (await cluster.leader(stage.broker, REQUESTS)).kill()


async def freeze_the_leader_of_the_log(cluster: Cluster, stage: Stage) -> None:
    node = await cluster.leader(stage.broker, LOG)
    node.pause()
    await asyncio.sleep(12)  # the fault itself: long enough for the others to elect, and then it comes back as a zombie
    node.resume()


async def freeze_a_follower(cluster: Cluster, stage: Stage) -> None:
    node = (await cluster.followers(stage.broker, LOG))[0]
    node.pause()
    await asyncio.sleep(3)  # the fault itself
    node.resume()


FAULTS = [
    step_down,
    kill_the_leader_of_the_log,
    kill_the_leader_of_the_queue,
    restart_all,
    freeze_the_leader_of_the_log,
    freeze_a_follower,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
async def test_an_answer_is_complete_after_the_fault(
    cluster: Cluster, fault: Callable[[Cluster, Stage], Awaitable[None]]
) -> None:
    async with pipeline(cluster) as stage:
        expected = await undisturbed(stage)
        generation = await asked(stage, "s", speed=25)
        client = stage.events("s", **{"from": "start"})
        following = asyncio.create_task(client.follow(whole))
        try:
            await eventually(lambda: len(client.events) > 20, timeout=RIDE)
            assert not whole(client)
            await fault(cluster, stage)
            async with asyncio.timeout(RIDE):
                await following
        finally:
            following.cancel()
        check(client, generation, expected)
        # A second reader, through the log alone, sees the same.
        again = stage.events("s", **{"from": "start"})
        async with asyncio.timeout(RIDE):
            await again.follow(whole)
        assert again.events == client.events
        assert again.ids == client.ids


def check(client: SseClient, generation: str, expected: str) -> None:
    assert [event["generation"] for event in client.events] == [generation] * len(client.events)
    assert [event["seq"] for event in client.events] == list(range(len(client.events)))
    assert [event["type"] for event in client.events if event["type"] in TERMINALS] == ["completed"]
    assert text_of(client.events) == expected
    assert client.ids == sorted(set(client.ids))


class Stepping:
    """A machine whose wall clock is set a day back or forward at every reading."""

    monotonic = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self._steps = itertools.cycle((0.0, 86_400.0, -86_400.0))

    def wall(self) -> float:
        return time.time() + next(self._steps)


async def test_clock_steps_change_neither_order_nor_cursors_nor_retention(broker: Broker, nats_url: str) -> None:
    async with delivering(nats_url) as stage, producing(broker, clock=Stepping()):
        first = await asked(stage, "s", tokens=60)
        client = stage.events("s", **{"from": "start"})
        async with asyncio.timeout(RIDE):
            await client.follow(whole)
        second = await asked(stage, "s", tokens=60)
        async with asyncio.timeout(RIDE):
            await client.follow(lambda c: c.events[-1]["type"] in TERMINALS and c.events[-1]["generation"] == second)
    seen = [(event["generation"], event["seq"]) for event in client.events]
    each = len(seen) // 2
    assert seen == [(name, seq) for name in (first, second) for seq in range(each)]
    assert client.ids == sorted(set(client.ids))
    stamps = [event["at"] for event in client.events]
    assert max(stamps) - min(stamps) > 86_400  # the clock was really wrong


async def test_live_messages_lost_between_brokers_are_read_from_the_log(broker: Broker, nats_url: str) -> None:
    address = Address(0, "default", "s", "g")
    async with delivering(nats_url) as stage:
        client = stage.events("s")
        following = asyncio.create_task(client.follow(lambda c: len(c.events) == 3))
        try:
            for seq in range(2):
                await broker.publish_stored(
                    token_subject(address), encode_event(Delta(generation="g", seq=seq, text=str(seq), tokens=seq))
                )
            await eventually(lambda: len(client.events) == 2)
            feed = await stage.replica.feeds.feed("default", "s")
            assert feed._subscription is not None
            # From here on nothing arrives, and nobody says so.
            stage.broker.client._arrivals[feed._subscription._id] = lambda *_: None
            await broker.publish_stored(
                token_subject(address), encode_event(Delta(generation="g", seq=2, text="lost", tokens=2))
            )
            async with asyncio.timeout(20):
                await following
        finally:
            following.cancel()
        assert text_of(client.events) == "01lost"
