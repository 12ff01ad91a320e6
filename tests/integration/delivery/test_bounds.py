"""Test slow, dead and many clients, memory bounds, and the ends of a stream by delivery."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from schemas.cursor import Cursor
from services.kit.jetstream.broker import Broker, Stored
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, Stage, delivering, keys, metric, story, subscribers
from tests.support.sse_client import SseClient, small_buffers

BIG = 60_000  # characters of one delta: a few hundred of them are more than sockets' buffers hold


async def test_client_that_stops_reading_is_read_from_the_log_and_gets_everything_once(
    broker: Broker, nats_server: NatsServer
) -> None:
    log, events = Log(broker), story("g1", 300, size=BIG)
    async with delivering(nats_server.url, feed_bytes=65_536) as stage, small_buffers() as slow_http:
        replays = metric("tailrace_delivery_replays_total")
        slow = SseClient(slow_http, f"{stage.url}/v1/sessions/s/events")
        quick = stage.events()
        async with slow.connected() as pausing, quick.connected() as reading:
            await eventually(lambda: subscribers() == 2)
            async with asyncio.TaskGroup() as group:
                group.create_task(log.append(*events))
                assert await reading.count(len(events))
            assert not slow.events
            assert metric("tailrace_delivery_blocked_writes_total") > 0
            assert sum(feed.tail.bytes for feed in stage.replica.feeds._feeds.values()) <= 65_536 + 2 * BIG
            assert await pausing.count(len(events))
        assert keys(quick.events) == keys(slow.events) == keys(events)
        assert slow.ids == quick.ids
        assert metric("tailrace_delivery_replays_total") > replays
        await stage.settled()


async def test_all_events_pass_through_a_feed_with_a_tail_of_one_event(broker: Broker, nats_server: NatsServer) -> None:
    log, events = Log(broker), story("g1", 150) + story("g2", 150)
    async with delivering(nats_server.url, feed_bytes=1) as stage:
        readers = [stage.events(**{"from": "start"}) for _ in range(5)]

        async def read(reader: SseClient) -> None:
            while len(reader.events) < len(events):
                async with reader.connected() as connection:
                    await connection.count(min(len(events), len(reader.events) + 70))

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(log.append(*events))
            for reader in readers:
                group.create_task(read(reader))
        assert all(keys(reader.events) == keys(events) for reader in readers)
        await stage.settled()


async def test_client_that_never_reads_is_evicted_while_live(broker: Broker, nats_server: NatsServer) -> None:
    async with delivering(nats_server.url, stall=0.5) as stage, never_reading(stage, "") as _:
        evicted = metric("tailrace_delivery_streams_closed_total", reason="evicted")
        await eventually(lambda: subscribers() == 1)
        await Log(broker).append(*story("g1", 300, size=BIG))
        await eventually(lambda: metric("tailrace_delivery_streams_closed_total", reason="evicted") == evicted + 1)
        await stage.settled()


async def test_client_that_never_reads_its_replay_is_evicted(broker: Broker, nats_server: NatsServer) -> None:
    await Log(broker).append(*story("g1", 300, size=BIG))
    async with delivering(nats_server.url, stall=0.5, feed_bytes=65_536) as stage:
        evicted = metric("tailrace_delivery_streams_closed_total", reason="evicted")
        async with never_reading(stage, "?from=start"):
            await eventually(lambda: subscribers() == 1)
            await eventually(lambda: metric("tailrace_delivery_streams_closed_total", reason="evicted") == evicted + 1)
            await stage.settled()


async def test_stalled_clients_do_not_block_replays_of_others(broker: Broker, nats_server: NatsServer) -> None:
    events = story("g1", 150, size=BIG)
    await Log(broker).append(*events)
    async with delivering(nats_server.url, feed_bytes=65_536) as stage:
        async with never_reading(stage, "?from=start", connections=40):
            await eventually(lambda: subscribers() == 40, timeout=20)
            reader = stage.events(generation="g1")
            async with asyncio.timeout(20):
                await reader.read_all()
            assert keys(reader.events) == keys(events)
            assert stage.broker.client.stats["reconnects"] == 0  # nor do they overrun the connection to the broker
        await stage.settled()


async def test_read_ahead_for_a_stalled_client_is_bounded_by_its_socket_buffers(
    broker: Broker, nats_server: NatsServer
) -> None:
    await Log(broker).append(*story("g1", 300, size=BIG))
    async with delivering(nats_server.url, feed_bytes=65_536) as stage:
        delivered = metric("tailrace_delivery_events_delivered_total")
        blocked = metric("tailrace_delivery_blocked_writes_total")
        async with never_reading(stage, "?from=start"):
            await eventually(lambda: metric("tailrace_delivery_blocked_writes_total") > blocked)
            await sweeps_passed(stage, 2)
            taken = (metric("tailrace_delivery_events_delivered_total") - delivered) * BIG
            assert taken < kernel_buffer() + 2 * 1024 * 1024
        await stage.settled()


def kernel_buffer() -> int:
    """Return the maximum bytes that the kernel buffers for one connection."""
    return int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2])


async def test_slow_replay_outlives_the_linger_of_its_feed(broker: Broker, nats_server: NatsServer) -> None:
    log, events = Log(broker), story("g1", 200, size=BIG)
    await log.append(*events)
    async with delivering(nats_server.url, linger=0.1, feed_bytes=65_536) as stage, small_buffers() as slow_http:
        slow = SseClient(slow_http, f"{stage.url}/v1/sessions/s/events", **{"from": "start"})
        async with slow.connected() as connection:
            sweeps = await sweeps_passed(stage, 3)
            assert sweeps >= 3
            assert stage.replica.feeds._feeds
            assert await connection.count(len(events))
            await log.append(*story("g2"))
            async with asyncio.timeout(10):
                assert await connection.count(len(events) + 13)
        await eventually(lambda: not stage.replica.feeds._feeds)


async def sweeps_passed(stage: Stage, count: int) -> int:
    """Wait until feeds have been swept so many times more."""
    seen = 0

    def counting(_now: float) -> None:
        nonlocal seen
        seen += 1

    stage.replica.supervisor.on_poll(counting)
    await eventually(lambda: seen >= count)
    return seen


@asynccontextmanager
async def never_reading(stage: Stage, query: str, connections: int = 1) -> AsyncIterator[list[socket.socket]]:
    """Hold connections that ask for the events of session ``s`` and take nothing of the answer."""
    address = urlsplit(stage.url)
    opened = []
    for _ in range(connections):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        await asyncio.to_thread(connection.connect, (address.hostname, address.port))
        connection.sendall(f"GET /v1/sessions/s/events{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        opened.append(connection)
    try:
        yield opened
    finally:
        for connection in opened:
            connection.close()


async def test_resources_of_vanished_clients_are_released(broker: Broker, nats_server: NatsServer) -> None:
    log = Log(broker)
    await log.append(*story("g1"))
    async with delivering(nats_server.url, linger=0.1) as stage:
        await eventually(lambda: stage.replica.storage._listens)  # its subscription is a task that stays
        tasks = len(asyncio.all_tasks())
        async with never_reading(stage, "", connections=40):
            await eventually(lambda: subscribers() == 40)
        await stage.settled()
        await eventually(lambda: not stage.replica.feeds._feeds)
        await eventually(lambda: metric("tailrace_delivery_feeds") == 0)
        await eventually(lambda: metric("tailrace_delivery_feed_bytes") == 0)
        await eventually(lambda: len(asyncio.all_tasks()) <= tasks + 1)


async def test_resources_of_a_client_that_vanishes_during_a_blocked_write_are_released(
    broker: Broker, nats_server: NatsServer
) -> None:
    log = Log(broker)
    async with delivering(nats_server.url, linger=0.1, feed_bytes=65_536) as stage:
        async with never_reading(stage, "", connections=5):
            await eventually(lambda: subscribers() == 5)
            blocked = metric("tailrace_delivery_blocked_writes_total")
            await log.append(*story("g1", 300, size=BIG))
            await eventually(lambda: metric("tailrace_delivery_blocked_writes_total") > blocked)
        await stage.settled()
        await eventually(lambda: not stage.replica.feeds._feeds)


async def test_half_closed_connection_ends_cleanly(broker: Broker, nats_server: NatsServer) -> None:
    await Log(broker).append(*story("g1"))
    async with delivering(nats_server.url) as stage, never_reading(stage, "", connections=3) as connections:
        await eventually(lambda: subscribers() == 3)
        for connection in connections:
            connection.shutdown(socket.SHUT_WR)
        await stage.settled()


async def test_silence_is_filled_with_heartbeats(broker: Broker, nats_server: NatsServer) -> None:
    async with delivering(nats_server.url, heartbeat=0.3) as stage:
        beats = 0
        async with stage.http.stream("GET", f"{stage.url}/v1/sessions/quiet/events") as response:
            async with asyncio.timeout(10):
                async for line in response.aiter_lines():
                    beats += line.startswith(":")
                    if beats == 2:
                        break
        await stage.settled()


async def test_replay_that_waits_for_its_reader_gets_no_heartbeat_into_its_events(
    broker: Broker, nats_server: NatsServer
) -> None:
    events = story("g1", 200, size=BIG)
    await Log(broker).append(*events)
    async with delivering(nats_server.url, heartbeat=0.1, feed_bytes=65_536) as stage, small_buffers() as http:
        slow = SseClient(http, f"{stage.url}/v1/sessions/s/events", generation="g1")
        async with slow.connected() as connection:
            await sweeps_passed(stage, 2)
            await connection.to_the_end()
        assert keys(slow.events) == keys(events)


async def test_stream_beyond_its_lifetime_ends_with_a_cursor_to_resume(broker: Broker, nats_server: NatsServer) -> None:
    events = story("g1")
    log = Log(broker)
    await log.append(*events[:5])
    async with delivering(nats_server.url, lifetime=0.5) as stage:
        reader = stage.events()
        async with asyncio.timeout(10):
            assert await reader.read_all() == 200
        [(name, notice)] = reader.controls
        assert (name, notice) == ("bye", {"reason": "lifetime", "cursor": reader.ids[-1]})
        await log.append(*events[5:])
        reader.last_id = notice["cursor"]
        async with reader.connected() as connection:
            assert await connection.count(len(events))
        assert keys(reader.events) == keys(events)


async def test_drain_ends_live_and_replaying_streams_with_a_cursor(broker: Broker, nats_server: NatsServer) -> None:
    events = story("g1", 200, size=BIG)
    await Log(broker).append(*events)
    async with delivering(nats_server.url, feed_bytes=65_536) as stage, small_buffers() as slow_http:
        live = stage.events(**{"from": "live"})
        slow = SseClient(slow_http, f"{stage.url}/v1/sessions/s/events", **{"from": "start"})
        async with live.connected() as one, slow.connected() as other:
            await eventually(lambda: subscribers() == 2)
            drained = asyncio.create_task(stage.replica.drain(5))
            async with asyncio.timeout(15):
                await one.to_the_end()
                await other.to_the_end()
            await drained
        assert live.controls[0][1]["reason"] == slow.controls[0][1]["reason"] == "drain"
        assert slow.controls[0][1]["cursor"] == slow.ids[-1]
        assert 0 < len(slow.events) < len(events)
        refused = await stage.http.get(f"{stage.url}/v1/sessions/s/events")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert (await stage.http.get(f"{stage.url}/readyz")).status_code == 503
    async with delivering(nats_server.url) as second:
        slow.http, slow.url = second.http, f"{second.url}/v1/sessions/s/events"
        async with slow.connected() as connection:
            assert await connection.count(len(events))
        assert keys(slow.events) == keys(events)


async def test_a_feed_beyond_the_limit_is_503(broker: Broker, nats_server: NatsServer) -> None:
    async with delivering(nats_server.url, feeds=1, linger=0.1) as stage:
        async with stage.events("one").connected() as connection:
            assert connection.status == 200
            refused = await stage.http.get(f"{stage.url}/v1/sessions/two/events")
            assert refused.status_code == 503
            assert refused.headers["retry-after"]

        async def free() -> bool:
            async with stage.events("two").connected() as connection:
                return connection.status == 200

        await eventually(free)


async def test_first_cursor_of_a_new_session_begins_at_its_first_event(broker: Broker, nats_server: NatsServer) -> None:
    async with delivering(nats_server.url) as stage:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        accepted = (await stage.http.post(f"{stage.url}/v1/sessions/s/generations", json=body)).json()
        assert Cursor.parse(accepted["cursor"]).seq == 0
        events = story(accepted["generation"])
        await Log(broker).append(*events)
        reader = stage.events(after=accepted["cursor"])
        async with reader.connected() as connection:
            assert await connection.count(len(events))
        assert keys(reader.events) == keys(events)


async def test_200_clients_that_return_together_share_the_reads_of_the_log(
    broker: Broker, nats_server: NatsServer
) -> None:
    events = story("g1", 1_200)
    await Log(broker).append(*events[:-1])
    async with delivering(nats_server.url, feed_bytes=1) as stage:
        first = stage.events()
        async with first.connected() as reading:
            assert await reading.count(len(events) - 1)
        reads: list[int] = []
        read_batch = stage.broker._read_batch

        async def counted(stream: str, filter_: str, from_seq: int, size: int) -> tuple[list[Stored], int]:
            reads.append(from_seq)
            return await read_batch(stream, filter_, from_seq, size)

        stage.broker._read_batch = counted  # type: ignore[method-assign]  # the test counts what the broker is asked
        places = [900 + number for number in range(200)]
        clients = [stage.events(after=first.ids[place]) for place in places]
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=30, limits=limits) as http:
            for client in clients:
                client.http = http

            async def return_(client: SseClient, place: int) -> None:
                async with client.connected() as reading:
                    assert await reading.count(len(events) - 1 - place - 1)

            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                for client, place in zip(clients, places, strict=True):
                    group.create_task(return_(client, place))
        assert all(
            keys(client.events) == keys(events[place + 1 : -1]) for client, place in zip(clients, places, strict=True)
        )
        assert len(reads) <= 20
        await stage.settled()
