"""WebSockets through the edge's own configuration, under a real nginx: in the clear and with TLS."""

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.kit.jetstream.broker import Broker
from tests.acceptance.test_http2_edge import Edge
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, Stage, delivering, keys, metric, story
from tests.support.websocket_client import socket

pytestmark = pytest.mark.acceptance


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url) as running:
        yield running


@pytest.fixture
async def edge(stage: Stage, tmp_path: Path) -> AsyncIterator[Edge]:
    started = Edge(tmp_path, stage.url, "127.0.0.1:1").start()
    try:
        await eventually(started.answers)
        yield started
    finally:
        started.stop()


def clear_address(edge: Edge) -> str:
    return f"http://127.0.0.1:{edge.http1}"


async def test_sockets_pass_the_edge_in_the_clear_and_with_tls(edge: Edge, broker: Broker) -> None:
    events = story("g1")
    await Log(broker).append(*events)
    trusting = ssl.create_default_context()
    edge.authority.configure_trust(trusting)
    for address, context in ((clear_address(edge), None), (f"https://localhost:{edge.tls}", trusting)):
        async with socket(address, ssl=context) as client:
            await client.say("subscribe", session="s", generation="g1", credit={"events": 2})
            while (message := await client.hear())["type"] != "end":
                if message["type"] == "events":
                    await client.say("ack", session="s", cursor=message["events"][-1]["cursor"])
        assert keys(client.events["s"]) == keys(events)


async def test_live_events_pass_the_edge_one_by_one_and_disconnects_are_noticed(edge: Edge, broker: Broker) -> None:
    log = Log(broker)
    async with socket(clear_address(edge)) as client:
        await client.ask("subscribe", id=1, session="s", from_="start")
        for count, event in enumerate(story("g1"), 1):
            await log.append(event)
            await client.gather("s", count)
        assert keys(client.events["s"]) == keys(story("g1"))
    await eventually(lambda: metric("tailrace_delivery_subscribers", transport="websocket") == 0)


async def test_socket_through_the_edge_gets_bye_when_its_replica_drains(
    edge: Edge, stage: Stage, broker: Broker
) -> None:
    await Log(broker).append(*story("g1")[:4])
    async with socket(clear_address(edge)) as client:
        await client.say("subscribe", session="s", from_="start")
        await client.gather("s", 4)
        await stage.replica.drain(10)
        assert (await client.hear("bye"))["cursor"] == client.cursors["s"][-1]
        assert (await client.closed())[0] == 1001
