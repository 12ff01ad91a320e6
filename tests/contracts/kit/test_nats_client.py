"""Test the fast path through the NATS client against the library version that it depends on."""

import asyncio
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop
from nats.aio.msg import Msg

from schemas.subjects import live_filter
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.client import RelayClient, header_number
from services.kit.jetstream.connection import PENDING_BYTES, Connection
from tests.conftest import NatsServer, eventually


async def test_listen_receives_subject_data_and_raw_headers(broker: Broker) -> None:
    heard: list[tuple[str, bytes, bytes]] = []
    subscription = await broker.listen("t.*", lambda *message: heard.append(message))
    await broker.publish("t.plain", b"one")
    await broker.publish("t.headed", b"two", headers={"Nats-Sequence": "17"})
    await eventually(lambda: len(heard) == 2)
    assert heard[0] == ("t.plain", b"one", b"")
    assert heard[1][:2] == ("t.headed", b"two")
    assert header_number(heard[1][2], b"Nats-Sequence: ") == 17
    assert header_number(heard[1][2], b"Nats-Last-Sequence: ") is None
    await broker.unlisten(subscription)
    await broker.publish("t.plain", b"three")
    await broker.flush()
    assert len(heard) == 2


async def test_a_stored_message_is_republished_with_the_headers_that_readers_need(broker: Broker) -> None:
    heard: list[bytes] = []
    subscription = await broker.listen(live_filter(0, "t", "s"), lambda _s, _d, headers: heard.append(headers))
    await broker.flush()
    first = await broker.publish_stored("tokens.0.t.s.g", b"one")
    second = await broker.publish_stored("tokens.0.t.s.g", b"two")
    await eventually(lambda: len(heard) == 2)
    assert [header_number(h, b"Nats-Sequence: ") for h in heard] == [first, second]
    assert [header_number(h, b"Nats-Last-Sequence: ") for h in heard] == [0, first]
    await broker.unlisten(subscription)


async def test_send_is_ordered_with_publish_and_acknowledged_by_the_stream(broker: Broker) -> None:
    heard: list[bytes] = []
    acknowledged: list[bytes] = []
    inbox = broker.client.new_inbox()
    subscriptions = [
        await broker.listen("tokens.0.t.s.g", lambda _s, data, _h: heard.append(data)),
        await broker.listen(inbox, lambda _s, data, _h: acknowledged.append(data)),
    ]
    for number in range(0, 100, 2):
        broker.send("tokens.0.t.s.g", str(number).encode(), inbox)
        await broker.publish("tokens.0.t.s.g", str(number + 1).encode())
    await eventually(lambda: len(heard) == 100 and len(acknowledged) == 50)
    assert [int(data) for data in heard] == list(range(100))
    assert all(b'"seq":' in data for data in acknowledged)
    for subscription in subscriptions:
        await broker.unlisten(subscription)


async def test_listeners_survive_a_reconnection(own_nats: NatsServer) -> None:
    heard: list[bytes] = []
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.listen("t", lambda _s, data, _h: heard.append(data))
        own_nats.kill()
        await eventually(lambda: not broker.is_connected)
        own_nats.start()
        await eventually(lambda: broker.is_connected)
        await broker.publish("t", b"again")
        await eventually(lambda: heard == [b"again"])


async def test_the_pending_send_buffer_is_bounded(own_nats: NatsServer) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        own_nats.stop()
        await eventually(lambda: not broker.is_connected)

        def send_much() -> None:
            for _ in range(2_000):
                broker.send("t", b"x" * 100_000, "r")

        with pytest.raises(BrokerUnavailable):
            send_much()


@pytest.mark.parametrize("headers", [b"", b"NATS/1.0\r\nNats-Sequence: x\r\n\r\n", b"NATS/1.0\r\nNats-Sequence: 1"])
def test_a_header_without_a_number_is_none(headers: bytes) -> None:
    assert header_number(headers, b"Nats-Sequence: ") is None


async def test_close_while_the_library_drops_a_socket_raises_no_cancellation(own_nats: NatsServer) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        writer = broker.client._transport._io_writer
        closing = asyncio.get_running_loop().create_future()
        writer._protocol._get_close_waiter = lambda _writer: closing
        asyncio.get_running_loop().call_later(0.05, closing.cancel)
    assert broker.client.is_closed


@pytest.mark.parametrize("call", ["request", "flush"])
async def test_a_cancellation_at_the_same_time_as_the_reply_takes_effect(broker: Broker, call: str) -> None:
    async def answer(msg: Msg) -> None:
        await broker.publish(msg.reply, b"heard")

    subscription = await broker.subscribe("questions", answer)
    await broker.flush()
    answered = 0

    async def ask() -> None:
        nonlocal answered
        while True:
            await (broker.request("questions") if call == "request" else broker.flush())
            answered += 1

    for attempt in range(50):
        task, begun = asyncio.create_task(ask()), answered
        while answered == begun:
            await asyncio.sleep(0)
        for _ in range(attempt):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=2)
        assert done, f"attempt {attempt} goes on"
    await subscription.unsubscribe()


def test_messages_sent_before_a_disconnect_is_noticed_are_sent_over_the_next_connection(nats_url: str) -> None:
    """Run under uvloop, as services do: asyncio's loop reports the loss as an error that the library handles."""

    async def lose() -> None:
        heard: list[bytes] = []
        async with Broker.connect(nats_url, "test") as broker, Broker.connect(nats_url, "other") as other:
            await other.listen("t.lost", lambda _s, data, _h: heard.append(data))
            await other.flush()
            client = broker.client
            reading = client._reading_task
            assert reading is not None
            reading.cancel()  # so that nobody notices
            client._transport._io_writer.transport.abort()
            await asyncio.sleep(0.05)
            for number in range(3):
                await broker.publish("t.lost", b"%d" % number)
                await asyncio.sleep(0.02)
            assert broker.is_connected
            await client._process_op_err(ConnectionResetError())
            await eventually(lambda: broker.is_connected, timeout=20)
            await broker.publish("t.lost", b"last")
            await eventually(lambda: heard[-1:] == [b"last"])
        assert heard[-2:] == [b"2", b"last"], "what came first may have been lost with the connection"

    uvloop.run(lose())


async def test_flush_sends_its_ping_after_all_earlier_messages(broker: Broker) -> None:
    written: list[bytes] = []
    transport = broker.client._transport

    class Recording:
        def __getattr__(self, name: str) -> object:
            return getattr(transport, name)

        def write(self, data: bytes) -> None:
            written.append(data)
            transport.write(data)

        def writelines(self, lines: list[bytes]) -> None:
            written.extend(lines)
            transport.writelines(lines)

    broker.client._transport = Recording()
    await broker.publish("t.x", b"sent before")
    await broker.flush()
    broker.client._transport = transport
    commands = b"".join(written)
    assert 0 <= commands.index(b"sent before") < commands.index(b"PING")


async def test_leave_handles_messages_that_the_server_already_sent(broker: Broker) -> None:
    heard: list[bytes] = []

    async def handle(msg: Msg) -> None:
        await asyncio.sleep(0.01)
        heard.append(msg.data)

    subscription = await broker.subscribe("t.late", handle)
    for number in range(10):
        await broker.publish("t.late", b"%d" % number)
    await broker.leave(subscription, 10.0)
    assert heard == [b"%d" % number for number in range(10)]
    await broker.publish("t.late", b"after")
    await broker.flush()
    assert len(heard) == 10
    assert subscription._id not in broker.client._subs


async def test_leave_waits_no_longer_than_its_timeout(own_nats: NatsServer) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:

        async def handle(_msg: Msg) -> None:
            raise AssertionError

        subscription = await broker.subscribe("t.x", handle)
        assert own_nats.process is not None
        own_nats.process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(10):
            await broker.leave(subscription, 0.1)
        assert subscription._id not in broker.client._subs
        own_nats.process.send_signal(signal.SIGCONT)


async def test_the_client_switches_from_a_frozen_server_to_another(own_nats: NatsServer, tmp_path: Path) -> None:
    """All buffers are full of unsent data, for which an orderly close would wait."""
    other = NatsServer(tmp_path / "other").start()
    try:
        async with Broker.connect(own_nats.url, "test") as broker:
            broker.client._server_pool.extend(_pool_of(other))
            assert own_nats.process is not None
            own_nats.process.send_signal(signal.SIGSTOP)
            begun = asyncio.get_running_loop().time()
            with suppress(BrokerUnavailable):
                for _ in range(60):
                    broker.send("t.x", bytes(500_000), "r")
                    await asyncio.sleep(0.01)

            def is_there() -> bool:
                url = broker.client.connected_url
                return url is not None and url.port == other.port

            await eventually(is_there, timeout=60)
            assert asyncio.get_running_loop().time() - begun < 60
            own_nats.process.send_signal(signal.SIGKILL)
    finally:
        other.stop()


def _pool_of(server: NatsServer) -> list[object]:
    client = RelayClient()
    client._setup_server_pool([server.url])
    return list(client._server_pool)


async def test_closing_does_not_wait_for_a_frozen_server(own_nats: NatsServer) -> None:
    async with asyncio.timeout(30):
        async with Broker.connect(own_nats.url, "test") as broker:
            assert own_nats.process is not None
            own_nats.process.send_signal(signal.SIGSTOP)
            with suppress(BrokerUnavailable):
                for _ in range(60):
                    broker.send("t.x", bytes(500_000), "r")
                    await asyncio.sleep(0.01)
            begun = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - begun < 5
    own_nats.process.send_signal(signal.SIGCONT)


async def test_a_cancellation_while_all_buffers_are_full_takes_effect(own_nats: NatsServer) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        assert own_nats.process is not None
        own_nats.process.send_signal(signal.SIGSTOP)

        published = 0

        async def publish() -> None:
            nonlocal published
            while True:
                published += 1
                await broker.publish("t.x", bytes(900_000))

        task = asyncio.create_task(publish())
        await eventually(lambda: published * 900_000 > PENDING_BYTES)
        task.cancel()
        async with asyncio.timeout(5):
            await asyncio.wait({task})
        assert task.cancelled()
        own_nats.process.send_signal(signal.SIGCONT)


async def test_connect_respects_its_timeout_when_the_library_loses_a_cancellation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = 0

    async def connect(_self: RelayClient, _servers: list[str], **_options: object) -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
                if lost > 1:
                    raise

    monkeypatch.setattr(RelayClient, "connect", connect)
    async with asyncio.timeout(15):
        with pytest.raises(BrokerUnavailable, match=r"no answer in 0\.1 s"):
            async with Connection.connect("nats://127.0.0.1:1", "test", wait=0.1):
                pass
    assert lost == 2


async def test_replies_of_concurrent_requests_go_to_their_own_requests(nats_server: NatsServer) -> None:
    async with Broker.connect(nats_server.url, "one") as one, Broker.connect(nats_server.url, "two") as two:

        def answer(data: bytes, reply: str) -> None:
            two.send(reply, data[::-1], "")

        subscription = await two.respond("asked.*", answer)
        await two.flush()
        found = await asyncio.gather(*(one.request(f"asked.{n}", b"%04d" % n) for n in range(500)))
        assert found == [(b"%04d" % n)[::-1] for n in range(500)]
        assert not one.client._replies
        await two.unlisten(subscription)
        await two.flush()
        assert await one.request("asked.1") is None, "nobody listens any more"


async def test_a_request_without_a_reply_leaves_nothing_behind(nats_server: NatsServer) -> None:
    async with Broker.connect(nats_server.url, "one") as one, Broker.connect(nats_server.url, "two") as two:
        await two.respond("silent", lambda _data, _reply: None)
        await two.flush()
        with pytest.raises(BrokerUnavailable):
            await one.request("silent", timeout=0.05)
        asking = asyncio.create_task(one.request("silent", timeout=30))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert not one.client._replies


async def test_a_message_that_wants_no_answer_gets_none(nats_server: NatsServer) -> None:
    async with Broker.connect(nats_server.url, "one") as one, Broker.connect(nats_server.url, "two") as two:
        heard: list[bytes] = []

        def answer(data: bytes, reply: str) -> None:
            heard.append(data)
            two.answer(reply, b"yes")

        await two.respond("told", answer)
        await two.flush()
        await one.publish("told", b"without")
        assert await one.request("told", b"with") == b"yes"
        assert heard == [b"without", b"with"]
        assert two.reconnects == 0, "an empty reply subject would end the connection"
