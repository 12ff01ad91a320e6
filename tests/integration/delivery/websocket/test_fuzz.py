"""Test that any bytes from a client get an answer or a close frame and do not affect other clients."""

import asyncio
import contextlib
import json
import os
import struct
from collections.abc import AsyncIterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, Stage, delivering, keys, metric, story
from tests.support.websocket_client import JSON, MSGPACK, SocketClient, socket

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=6,
)
SESSIONS = st.sampled_from(["s", "t", "", "a.b", "*", ">", "x" * 300, "é", "s\n"])
CURSORS = st.sampled_from(["", "t1", "t1" + "0" * 30, "t1" + "f" * 30, "t1" + "0" * 30 + ".00000001"]) | st.text(
    max_size=40
)
CREDIT = st.fixed_dictionaries({}, optional={"events": st.integers(-1, 2**32), "bytes": st.integers(0, 2**40)})
MESSAGES = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("subscribe"), "session": SESSIONS},
        optional={
            "id": st.integers(0, 9),
            "generation": SESSIONS | st.sampled_from(["g1", "g2"]),
            "after": CURSORS,
            "from": st.sampled_from(["start", "live", "end"]),
            "credit": CREDIT,
            "window": st.sampled_from(["auto", "x"]),
            "granularity": st.sampled_from(["token", "line", "sentence", "word"]),
            "coalesce": st.integers(-5, 2_000),
        },
    ),
    st.fixed_dictionaries({"type": st.just("unsubscribe"), "session": SESSIONS}),
    st.fixed_dictionaries({"type": st.just("ack"), "session": SESSIONS, "cursor": CURSORS}),
    st.fixed_dictionaries({"type": st.just("credit"), "session": SESSIONS}, optional={"events": st.integers(-1, 99)}),
    st.fixed_dictionaries({"type": st.just("cancel"), "session": SESSIONS, "generation": SESSIONS}),
    st.fixed_dictionaries({"type": st.just("start"), "session": SESSIONS, "request": JUNK}),
    st.fixed_dictionaries({"type": st.sampled_from(["ping", "pong", "events", "bye"])}, optional={"id": JUNK}),
    st.dictionaries(st.sampled_from(["type", "id", "session"]), JUNK, max_size=3),
    JUNK,
)
SOME = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url) as running:
        await Log(broker).append(*story("g1"))
        yield running
        await eventually(lambda: metric("tailrace_delivery_sockets") == 0)
        assert metric("tailrace_delivery_subscribers", transport="websocket") == 0


async def is_still_served(stage: Stage) -> None:
    async with socket(stage.url) as client:
        await client.say("subscribe", session="s", generation="g1")
        await client.hear("end")
        assert keys(client.events["s"]) == keys(story("g1"))


async def answers(client: SocketClient) -> None:
    """Find out that the socket is alive: it answers under a name that nothing before had."""
    name = os.urandom(8).hex()
    await client.say("ping", id=name)
    while (message := await client.hear()).get("id") != name:
        assert message["type"] != "error" or message["problem"]["status"] < 500, message
    assert message["type"] == "pong"


def in_loop(stage: Stage, work: object) -> None:
    """Run a coroutine in the stage's loop from the thread of the property."""
    asyncio.run_coroutine_threadsafe(work, stage_loop[id(stage)]).result(60)  # type: ignore[arg-type]


stage_loop: dict[int, asyncio.AbstractEventLoop] = {}


@pytest.mark.parametrize("subprotocol", [JSON, MSGPACK])
async def test_any_messages_are_answered_and_the_socket_stays_open(stage: Stage, subprotocol: str) -> None:
    stage_loop[id(stage)] = asyncio.get_running_loop()

    async def one_run(messages: list[object]) -> None:
        async with socket(stage.url, subprotocol) as client:
            for message in messages:
                packed = msgspec.msgpack.encode(message) if client.binary else json.dumps(message)
                await client.connection.send(packed)
            await answers(client)

    @SOME
    @given(st.lists(MESSAGES, max_size=12))
    def run(messages: list[object]) -> None:
        in_loop(stage, one_run(messages))

    await asyncio.to_thread(run)
    await is_still_served(stage)


async def test_any_frames_of_text_and_bytes_are_answered(stage: Stage) -> None:
    stage_loop[id(stage)] = asyncio.get_running_loop()

    async def one_run(frames: list[str | bytes]) -> None:
        async with socket(stage.url) as client:
            for frame in frames:
                await client.connection.send(frame)
                found = await client.hear("error")
                assert found["problem"]["status"] == 400
            await answers(client)

    no_messages = st.text(max_size=60).filter(lambda text: '"type"' not in text)

    @SOME
    @given(st.lists(no_messages | st.binary(max_size=60), max_size=6))
    def run(frames: list[str | bytes]) -> None:
        in_loop(stage, one_run(frames))

    await asyncio.to_thread(run)
    await is_still_served(stage)


HANDSHAKE = (
    b"GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def masked(opcode: int, data: bytes, *, fin: bool = True, length: int | None = None) -> bytes:
    """A client's frame, masked with zeros; ``length`` may lie."""
    size = len(data) if length is None else length
    head = bytes([(0x80 if fin else 0) | opcode])
    head += bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + struct.pack(">H", min(size, 65_535))
    return head + b"\0\0\0\0" + data


FRAMES = st.one_of(
    st.binary(max_size=40),
    st.builds(masked, st.integers(0, 15), st.binary(max_size=200), fin=st.booleans()),
    st.builds(masked, st.integers(0, 15), st.binary(max_size=20), length=st.integers(0, 65_535)),
    st.builds(lambda data: masked(8, data), st.binary(max_size=30)),
    st.just(masked(1, b"\xff\xfe")),
    st.just(masked(1, b'{"type":"ping"}')),
    st.just(b"\x81\x05hello"),  # not masked
)


async def test_any_bytes_after_the_handshake_affect_no_other_client(stage: Stage) -> None:
    stage_loop[id(stage)] = asyncio.get_running_loop()
    port = int(stage.url.rsplit(":", 1)[1])

    async def one_run(frames: list[bytes]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(HANDSHAKE)
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            assert b" 101 " in answer.splitlines()[0]
            with contextlib.suppress(ConnectionError):
                for frame in frames:
                    writer.write(frame)
                    await writer.drain()
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    @SOME
    @given(st.lists(FRAMES, min_size=1, max_size=8))
    def run(frames: list[bytes]) -> None:
        in_loop(stage, one_run(frames))

    await asyncio.to_thread(run)
    await is_still_served(stage)


async def test_invalid_utf8_ends_the_socket(stage: Stage) -> None:
    async with socket(stage.url) as client:
        client.connection.transport.write(masked(1, b"\xff\xfe"))
        with pytest.raises(ConnectionClosed):
            await client.hear()
    await is_still_served(stage)
