"""Test limits of streams, starts and running generations, per key and tenant, shared by replicas."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import RateLimitItemPerMinute
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from schemas.requests import GenerationRecord
from schemas.topology import COUNTERS
from services.kit.jetstream.broker import Broker
from services.kit.limits import CounterStorage
from tests.conftest import NatsServer, eventually
from tests.support.credentials import bearer, guarded, make_key, problem, token
from tests.support.delivery_server import Stage, delivering, metric

WISH = {"model": "scripted/story", "messages": [{"role": "user", "content": "rivers"}]}


class Clock:
    """A clock that the test sets."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


async def start(stage: Stage, credential: str, session: str = "s", **headers: str) -> httpx.Response:
    path = f"{stage.url}/v1/sessions/{session}/generations"
    return await stage.http.post(path, json=WISH, headers=bearer(credential) | headers)


def refused(answer: httpx.Response, slug: str) -> int:
    """Check that an answer refuses because of a limit, and return after how many seconds to come again."""
    problem(answer, 429, slug)
    return int(answer.headers["retry-after"])


def limited(limit: str, whose: str) -> float:
    return metric("tailrace_delivery_limited_total", limit=limit, whose=whose)


async def test_starts_per_minute_are_limited_per_tenant_over_all_replicas_and_keys(
    broker: Broker, nats_url: str, tmp_path: Path
) -> None:
    before = limited("starts", "tenant")
    async with AsyncExitStack() as stack:
        stages = [
            await stack.enter_async_context(guarded(nats_url, tmp_path, starts_per_minute_per_tenant=6))
            for _ in range(2)
        ]
        keys = [(await make_key(stages[0], "start", tenant="acme"))["key"] for _ in range(2)]
        answers = [await start(stages[n % 2], keys[n // 2 % 2]) for n in range(12)]
        assert [a.status_code for a in answers].count(202) == 6
        assert {a.status_code for a in answers[:6]} == {202}
        assert 1 <= refused(answers[-1], "too-many-starts") <= 60
        assert (await start(stages[0], token("globex", "start"))).status_code == 202
    assert limited("starts", "tenant") - before == 6


async def test_starts_per_minute_are_limited_per_key(broker: Broker, nats_url: str, tmp_path: Path) -> None:
    async with guarded(nats_url, tmp_path, starts_per_minute_per_key=3) as stage:
        first, second = [(await make_key(stage, "start", tenant="acme"))["key"] for _ in range(2)]
        assert [(await start(stage, first)).status_code for _ in range(5)] == [202, 202, 202, 429, 429]
        assert (await start(stage, second)).status_code == 202


async def test_concurrent_starts_on_two_replicas_never_exceed_the_rate(
    broker: Broker, nats_url: str, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        stages = [
            await stack.enter_async_context(guarded(nats_url, tmp_path, starts_per_minute_per_tenant=10))
            for _ in range(2)
        ]
        credential = token("acme", "start")
        answers = await asyncio.gather(*(start(stages[n % 2], credential) for n in range(40)))
        codes = [a.status_code for a in answers]
        assert set(codes) == {202, 429}
        assert codes.count(202) <= 10
        assert codes.count(202) >= 5


async def test_without_a_shared_counter_a_replica_limits_by_its_own_count(
    broker: Broker, nats_url: str, tmp_path: Path
) -> None:
    before = metric("tailrace_delivery_limits_blind_total")
    async with guarded(nats_url, tmp_path, starts_per_minute_per_tenant=3) as stage:
        await broker.js.delete_stream(COUNTERS)
        credential = token("acme", "start")
        codes = [(await start(stage, credential)).status_code for _ in range(5)]
        assert codes == [202, 202, 202, 429, 429]  # the replica counts for itself
    assert metric("tailrace_delivery_limits_blind_total") > before


async def put(broker: Broker, generation: str, **fields: Any) -> None:
    """Store a record as delivery and producers do."""
    import msgspec

    record = GenerationRecord(
        tenant="acme", session="s", generation=generation, model="m", **{"created_at": time.time()} | fields
    )
    bucket = await broker.bucket()
    await bucket.put(f"acme.s.{generation}", msgspec.json.encode(record))


async def test_running_generations_are_limited_per_tenant(broker: Broker, nats_url: str, tmp_path: Path) -> None:
    async with guarded(nats_url, tmp_path, running_per_tenant=2) as stage:
        credential = token("acme", "start")
        answers = [await start(stage, credential) for _ in range(3)]
        assert [a.status_code for a in answers] == [202, 202, 429]
        assert refused(answers[2], "too-many-running") >= 1
        assert (await start(stage, token("globex", "start"))).status_code == 202
        await put(broker, answers[0].json()["generation"], state="completed", ended_at=time.time())

        async def admitted() -> bool:
            return (await start(stage, credential)).status_code == 202

        await eventually(admitted, timeout=10, interval=0.2)


async def test_a_replica_started_later_counts_running_generations(
    broker: Broker, nats_url: str, tmp_path: Path
) -> None:
    for n in range(2):
        await put(broker, f"g{n}", state="running", key="jwt:test")
    await put(broker, "old", state="running", created_at=time.time() - 10_000)
    await put(broker, "done", state="failed")
    async with guarded(nats_url, tmp_path, running_per_key=2) as stage:

        async def full() -> bool:
            return (await start(stage, token("acme", "start"))).status_code == 429

        await eventually(full, timeout=10, interval=0.2)
        assert (await start(stage, token("acme", "start", sub="another"))).status_code == 202


async def test_a_refused_start_creates_no_session(broker: Broker, nats_url: str, tmp_path: Path) -> None:
    async with guarded(nats_url, tmp_path, starts_per_minute_per_tenant=1) as stage:
        credential = token("acme", "start", "read")
        assert (await start(stage, credential, "first")).status_code == 202
        assert (await start(stage, credential, "second")).status_code == 429
        listed = await stage.http.get(f"{stage.url}/v1/sessions", headers=bearer(credential))
        assert [s["session"] for s in listed.json()["sessions"]] == ["first"]


@pytest.mark.parametrize(
    ("settings", "status"), [({"streams_per_tenant": 2}, 429), ({"streams_per_key": 2}, 429), ({"streams": 2}, 503)]
)
async def test_open_streams_are_limited(
    broker: Broker, nats_url: str, tmp_path: Path, settings: dict[str, int], status: int
) -> None:
    async with guarded(nats_url, tmp_path, **settings) as stage, AsyncExitStack() as stack:
        headers = bearer(token("acme", "read"))
        for _ in range(2):
            reader = await stack.enter_async_context(stage.events("s").connected(**headers))
            assert reader.status == 200
        full = await stage.http.get(f"{stage.url}/v1/sessions/s/events", headers=headers)
        problem(full, status, "too-many-streams")
        assert int(full.headers["retry-after"]) > 0
        other = bearer(token("globex", "read"))
        async with stage.events("s").connected(**other) as reader:
            assert (reader.status == 200) == (status == 429)
        await stack.aclose()

        async def room() -> bool:
            async with stage.events("s").connected(**headers) as reader:
                return reader.status == 200

        await eventually(room, timeout=10)


@given(pauses=st.lists(st.floats(0, 40), max_size=60), rate=st.integers(1, 8))
def test_no_clock_minute_admits_more_than_the_rate(pauses: list[float], rate: int) -> None:
    async def run() -> None:
        clock = Clock()
        limiter = SlidingWindowCounterRateLimiter(CounterStorage(Silent(), clock))  # type: ignore[arg-type]
        item = RateLimitItemPerMinute(rate)
        windows: Counter[int] = Counter()
        for pause in pauses:
            clock.now += pause
            windows[int(clock.now // 60)] += await limiter.hit(item, "x")
        assert all(count <= rate for count in windows.values())

    asyncio.run(run())


class Silent:
    """A broker that never answers."""

    is_connected = False

    async def request(self, *_args: object, **_options: object) -> None:
        raise TimeoutError


async def test_two_replicas_share_their_counts(broker: Broker) -> None:
    clock = Clock()
    storages = [CounterStorage(broker, clock) for _ in range(2)]
    assert [await storages[n % 2].incr("k", 60) for n in range(4)] == [1, 2, 3, 4]
    assert await storages[0].acquire_sliding_window_entry("k", 5, 60)
    assert not await storages[1].acquire_sliding_window_entry("k", 5, 60)
    clock.now += 60  # all of the window before still counts, then less and less of it
    assert not await storages[0].acquire_sliding_window_entry("k", 5, 60)
    clock.now += 30
    assert await storages[1].acquire_sliding_window_entry("k", 5, 60)
    await storages[0].clear_sliding_window("k", 60)
    assert (await storages[0].get_sliding_window("k", 60))[::2] == (0, 0)


async def test_the_shared_counter_is_used_again_after_an_outage(own_nats: NatsServer) -> None:
    from schemas.topology import Topology

    silences: list[None] = []
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology())
        clock = Clock()
        storage = CounterStorage(broker, clock, lambda: silences.append(None))
        assert await storage.incr("k", 60) == 1
        own_nats.stop()
        await eventually(lambda: not broker.is_connected)
        assert await storage.incr("k", 60) == 2
        assert silences
        own_nats.start()
        await eventually(lambda: broker.is_connected)
        clock.now += 2
        told = len(silences)

        async def counts() -> bool:
            clock.now += 2
            await storage.incr("k", 600)
            return len(silences) == told

        await broker.apply(Topology())
        await eventually(counts)


@contextmanager
def connection(stage: Stage) -> Iterator[socket.socket]:
    host, port = stage.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as opened:
        yield opened


@pytest.fixture
async def plain(broker: Broker, nats_url: str) -> AsyncIterator[Stage]:
    async with delivering(nats_url) as stage:
        yield stage


async def test_headers_of_excessive_size_are_refused(plain: Stage) -> None:
    for headers in ({"X-Large": "x" * 200_000}, {f"X-{n}": "x" * 50 for n in range(5_000)}):
        try:
            answer = await plain.http.get(f"{plain.url}/healthz", headers=headers)
        except httpx.TransportError:
            continue  # cut off
        assert answer.status_code == 431
    assert (await plain.http.get(f"{plain.url}/healthz")).status_code == 200


async def test_a_client_that_sends_headers_slowly_is_disconnected(plain: Stage) -> None:
    def trickle() -> float:
        began = time.monotonic()
        with connection(plain) as opened:
            opened.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
            opened.settimeout(1.0)
            while time.monotonic() - began < 30:
                try:
                    opened.recv(1_000)  # an answer that refuses, or the end
                    return time.monotonic() - began
                except TimeoutError:
                    try:
                        opened.sendall(b"X-A: b\r\n")
                    except OSError:
                        return time.monotonic() - began
                except OSError:
                    return time.monotonic() - began
        return time.monotonic() - began

    assert await asyncio.to_thread(trickle) < 25
