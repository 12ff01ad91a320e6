"""Several sessions over one connection, with one cursor that is exact at every event."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.delivery.formats.multi_cursor import MAX_SESSIONS
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, Stage, delivering, keys, metric, story
from tests.support.sse_client import SseClient, small_buffers

NAMES = ["a", "b", "c"]


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url) as running:
        yield running
        await eventually(lambda: connected() == 0)


@pytest.fixture
def logs(broker: Broker) -> dict[str, Log]:
    return {name: Log(broker, name) for name in NAMES}


def connected() -> float:
    return metric("tailrace_delivery_subscribers", transport="sse-several")


def client_of(stage: Stage, *sessions: str, **query: str) -> SseClient:
    client = SseClient(stage.http, f"{stage.url}/v1/events", **query)
    several: Any = {"session": list(sessions)}
    client.query |= several
    return client


def by_session(client: SseClient) -> dict[str, list[tuple[str, int]]]:
    found: dict[str, list[tuple[str, int]]] = {}
    for item in client.events:
        found.setdefault(item["session"], []).extend(keys([item["event"]]))
    return found


def name_of(session: str) -> str:
    return f"g_{session}"


def stories(deltas: int = 10) -> dict[str, list[Any]]:
    return {name: story(name_of(name), deltas) for name in NAMES}


async def append_all(logs: dict[str, Log], told: dict[str, list[Any]], pause: float = 0.0) -> None:
    await asyncio.gather(*(logs[name].append(*events, pause=pause) for name, events in told.items()))


def total(told: dict[str, list[Any]]) -> int:
    return sum(map(len, told.values()))


async def test_sessions_are_read_concurrently_and_events_name_their_session(stage: Stage, logs: dict[str, Log]) -> None:
    told = stories()
    client = client_of(stage, *NAMES)
    async with client.connected() as connection:
        await eventually(lambda: connected() == 3)
        await append_all(logs, told)
        assert await connection.count(total(told))
    assert by_session(client) == {name: keys(events) for name, events in told.items()}
    assert client.retry == 1_000
    assert len(set(client.ids)) == len(client.ids)


async def test_every_cursor_has_the_position_of_every_session(stage: Stage, logs: dict[str, Log]) -> None:
    told = stories(4)
    await append_all(logs, told)
    whole = client_of(stage, *NAMES)
    async with whole.connected() as connection:
        assert await connection.count(total(told))
    for position, cursor in enumerate(whole.ids[:-1], 1):
        again = client_of(stage, *NAMES, after=cursor)
        async with again.connected() as connection:
            assert await connection.count(total(told) - position)
        seen = by_session(again)
        for name in NAMES:
            had = [key for item in whole.events[:position] if item["session"] == name for key in keys([item["event"]])]
            assert had + seen.get(name, []) == keys(told[name])


@pytest.mark.parametrize("seed", range(3))
async def test_reconnecting_at_any_moment_misses_and_repeats_nothing(
    stage: Stage, logs: dict[str, Log], seed: int
) -> None:
    rng, told = random.Random(seed), stories(60)
    writing = asyncio.create_task(append_all(logs, told, pause=0.004))
    client = client_of(stage, *NAMES, **{"from": "start"})
    async with asyncio.timeout(30):
        while len(client.events) < total(told):
            async with client.connected() as connection:
                await connection.count(min(total(told), len(client.events) + rng.randint(0, 20)))
    await writing
    assert by_session(client) == {name: keys(events) for name, events in told.items()}


async def test_sessions_may_be_added_and_removed_on_reconnection(stage: Stage, logs: dict[str, Log]) -> None:
    told = stories()
    await append_all(logs, told)
    first = client_of(stage, "a", "b")
    async with first.connected() as connection:
        assert await connection.count(5)
    second = client_of(stage, "b", "c", after=first.last_id)
    had = by_session(first).get("b", [])
    async with second.connected() as connection:
        assert await connection.count(26 - len(had))
    assert had + by_session(second).get("b", []) == keys(told["b"])
    assert by_session(second)["c"] == keys(told["c"])


async def test_cursor_of_one_session_resumes_that_session(stage: Stage, logs: dict[str, Log]) -> None:
    told = stories()
    await append_all(logs, told)
    alone = stage.events("a", generation=name_of("a"))
    await alone.read_all()
    client = client_of(stage, "a", "b", after=alone.ids[5])
    async with client.connected() as connection:
        assert await connection.count(7 + 13)
    assert by_session(client) == {"a": keys(told["a"])[6:], "b": keys(told["b"])}


async def test_several_sessions_over_ndjson_and_post(stage: Stage, logs: dict[str, Log]) -> None:
    told = stories()
    await append_all(logs, told)
    ask = {"sessions": NAMES, "from": "start", "granularity": "line"}
    found: dict[str, str] = dict.fromkeys(NAMES, "")
    cursor, ended = "", 0
    accept = {"Accept": "application/x-ndjson"}
    async with stage.http.stream("POST", f"{stage.url}/v1/events", json=ask, headers=accept) as response:
        assert response.headers["content-type"] == "application/x-ndjson"
        async for line in response.aiter_lines():
            item = json.loads(line)
            found[item["session"]] += item["event"].get("text", "")
            ended += item["event"]["type"] == "completed"
            assert item["cursor"] != cursor
            cursor = item["cursor"]
            if ended == 3:
                break
    assert found == {name: "".join(f"{name_of(name)}:{n} " for n in range(1, 11)) for name in NAMES}
    await eventually(lambda: metric("tailrace_delivery_subscribers", transport="ndjson-several") == 0)


async def test_drain_ends_all_sessions_with_one_cursor(
    broker: Broker, nats_server: NatsServer, logs: dict[str, Log]
) -> None:
    told = stories()
    async with delivering(nats_server.url) as stage:
        client = client_of(stage, *NAMES)
        async with client.connected() as connection:
            await eventually(lambda: connected() == 3)
            await append_all(logs, {name: events[:4] for name, events in told.items()})
            assert await connection.count(12)
            drained = asyncio.create_task(stage.replica.drain(5))
            await connection.to_the_end()
            await drained
        assert client.controls == [("bye", {"reason": "drain", "cursor": client.last_id})]
    await append_all(logs, {name: events[4:] for name, events in told.items()})
    async with delivering(nats_server.url) as second:
        again = client_of(second, *NAMES, after=client.last_id)
        async with again.connected() as connection:
            assert await connection.count(total(told) - 12)
    for name in NAMES:
        assert by_session(client)[name] + by_session(again)[name] == keys(told[name])


async def test_client_that_stops_reading_gets_everything_once_later(
    broker: Broker, nats_server: NatsServer, logs: dict[str, Log]
) -> None:
    told = {name: story(name_of(name), 150, size=20_000) for name in NAMES}
    async with delivering(nats_server.url, feed_bytes=1_000_000) as stage, small_buffers() as http:
        client = client_of(stage, *NAMES)
        client.http = http
        async with client.connected() as connection:
            await eventually(lambda: connected() == 3)
            await append_all(logs, told)  # nobody reads meanwhile
            assert await connection.count(total(told))
        assert by_session(client) == {name: keys(events) for name, events in told.items()}
        await eventually(lambda: connected() == 0)


async def test_an_expired_position_is_a_gap_and_its_session_starts_over(
    stage: Stage, logs: dict[str, Log], broker: Broker
) -> None:
    told = stories()
    await append_all(logs, told)
    first = client_of(stage, "a", "b")
    async with first.connected() as connection:
        assert await connection.count(26)
    early = next(i for i, item in zip(first.ids, first.events, strict=True) if item["session"] == "a")
    last = await logs["a"].append(*story("g_new"))
    await broker.js.purge_stream("TOKENS_0", subject="tokens.*.*.a.g_a")
    await broker.js.purge_stream("TOKENS_0", seq=last[0])
    await stage.replica.states.state(0, fresh=True)
    client = client_of(stage, "a", "b", after=early)
    async with client.connected() as connection:
        assert await connection.count(13)
    assert {"session": "a", "reason": "expired"} in [data for name, data in client.controls if name == "gap"]
    assert by_session(client)["a"] == keys(story("g_new"))


async def test_sessions_of_one_connection_share_heartbeats(broker: Broker, nats_server: NatsServer) -> None:
    async with delivering(nats_server.url, heartbeat=1.0) as stage:
        address = f"{stage.url}/v1/events?session=a&session=b&session=c"
        async with stage.http.stream("GET", address) as response:
            lines = response.aiter_lines()
            beats = 0
            started = asyncio.get_running_loop().time()
            while beats < 3:
                beats += (await anext(lines)).startswith(": hb")
        assert asyncio.get_running_loop().time() - started > 1.0
        await eventually(lambda: connected() == 0)


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 400),
        ("session=a&session=a", 400),
        ("session=a.b", 400),
        ("session=a&generation=g", 400),
        ("session=a&wait=1", 400),
        ("session=a&after=nonsense", 400),
        ("session=a&after=m1AAAA", 400),
        ("session=a&from=middle", 400),
        ("session=a&after=x&after=y", 400),
        ("&".join(f"session=s{n}" for n in range(MAX_SESSIONS + 1)), 400),
    ],
)
async def test_invalid_read_options_are_refused(stage: Stage, query: str, status: int) -> None:
    response = await stage.http.get(f"{stage.url}/v1/events?{query}")
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"


async def test_the_maximum_number_of_sessions_shares_one_connection(stage: Stage, broker: Broker) -> None:
    names = [f"s{n}" for n in range(MAX_SESSIONS)]
    client = client_of(stage, *names)
    async with client.connected() as connection:
        await eventually(lambda: connected() == MAX_SESSIONS)
        for name in names:
            await Log(broker, name).append(*story(f"g_{name}", 1)[:1])
        assert await connection.count(MAX_SESSIONS)
    assert len(client.last_id) < 600
