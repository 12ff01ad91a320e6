"""Test unreadable consumer positions, with which nats-server starts without the consumer and cannot create it."""

from pathlib import Path

import pytest

from schemas.topology import Topology
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.consumer import Durables
from services.standalone.store import is_position, set_aside_unreadable
from tests.conftest import NatsServer
from tests.support.store_damage import stream_folder

SPOILED = {
    "random": lambda data: b"\x07" * 40,
    "cut-off": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: b"\0" * len(data),
    "version": lambda data: data[:1] + b"\x09" + data[2:],
}


async def deliver(server: NatsServer) -> Path:
    """Leave a consumer with positions of every kind: acknowledged, pending, given again."""
    async with Broker.connect(server.url, "test") as broker:
        await broker.apply(Topology())
        for _ in range(9):
            await broker.publish_stored("requests.default.g" + str(_), b"{}")
        pulled = await broker.js.pull_subscribe_bind("producers-default", "REQUESTS")
        messages = await pulled.fetch(6)
        await messages[0].ack_sync()
        await messages[1].nak()
        await pulled.fetch(1)
    server.stop()
    return stream_folder(server.folder, "REQUESTS") / "obs" / "producers-default" / "o.dat"


async def test_positions_written_by_the_server_are_recognised(own_nats: NatsServer) -> None:
    path = await deliver(own_nats)
    assert len(path.read_bytes()) > 10
    assert is_position(path.read_bytes())
    assert set_aside_unreadable(own_nats.folder, own_nats.folder / "damaged") == []


@pytest.mark.parametrize("kind", SPOILED)
async def test_a_consumer_with_an_unreadable_position_starts_over(own_nats: NatsServer, kind: str) -> None:
    path = await deliver(own_nats)
    path.write_bytes(SPOILED[kind](path.read_bytes()))
    own_nats.start()
    async with Broker.connect(own_nats.url, "test") as broker:
        with pytest.raises(BrokerUnavailable, match="error creating store for consumer"):
            await broker.apply(Topology(), wait=0)
    own_nats.stop()
    assert set_aside_unreadable(own_nats.folder, own_nats.folder / "damaged") == ["producers-default of REQUESTS"]
    own_nats.start()
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology(), wait=0)
        info = await Durables(broker).info("REQUESTS", "producers-default")
        assert info is not None
        assert info.num_pending == 8, "all that was not acknowledged is given"
