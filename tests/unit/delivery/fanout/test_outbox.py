"""The outbox of a connection: order, bound, turns, joining, and the ends of client and connection."""

import asyncio
from typing import Any

import pytest

from services.delivery.fanout.outbox import BOUND, Outbox
from services.delivery.formats.websocket import message_size
from tests.conftest import eventually


class Wire:
    """A server's ``send`` that takes a message when it is let, and notices when it is called meanwhile."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.open = asyncio.Event()
        self.busy = False

    async def send(self, message: dict[str, Any]) -> None:
        assert not self.busy, "called while a message is under way"
        self.busy = True
        try:
            await self.open.wait()
            await asyncio.sleep(0)
            self.taken.append(message["text"])
        finally:
            self.busy = False


def text(data: str) -> list[dict[str, Any]]:
    return [{"type": "websocket.send", "text": data}]


async def test_messages_of_one_write_stay_together_and_in_order() -> None:
    wire = Wire()
    wire.open.set()
    async with Outbox(wire.send, message_size) as outbox:
        await asyncio.gather(*(outbox.send(text(f"{n}a") + text(f"{n}b")) for n in range(20)))
        assert await outbox.flush(5)
    assert wire.taken == [f"{n}{half}" for n in range(20) for half in "ab"]


async def test_who_has_more_than_fits_waits_for_a_turn_and_turns_are_fair() -> None:
    wire = Wire()
    async with Outbox(wire.send, message_size) as outbox:
        await outbox.send(text("x" * BOUND))
        waiting = [asyncio.create_task(outbox.send(text(f"{n}" * 40_000))) for n in range(6)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        assert not outbox.offer(text("ping"))
        assert outbox._size == BOUND
        wire.open.set()
        await asyncio.gather(*waiting)
        assert await outbox.flush(5)
    assert [data[0] for data in wire.taken] == ["x", "0", "1", "2", "3", "4", "5"]


async def test_turn_that_is_given_up_passes_on() -> None:
    wire = Wire()
    async with Outbox(wire.send, message_size) as outbox:
        await outbox.send(text("x" * BOUND))
        first, second, third = (asyncio.create_task(outbox.send(text(name))) for name in "abc")
        await asyncio.sleep(0)
        first.cancel()
        wire.open.set()
        await eventually(lambda: outbox._size < BOUND)
        second.cancel()
        await asyncio.gather(first, second, third, return_exceptions=True)
        assert third.exception() is None
        assert await outbox.flush(5)
    assert wire.taken[-1] == "c"
    assert "a" not in wire.taken


async def test_client_that_takes_nothing_is_seen() -> None:
    wire = Wire()
    async with Outbox(wire.send, message_size) as outbox:
        assert outbox.blocked_at is None
        await outbox.send(text("x"))
        await eventually(lambda: outbox.blocked_at is not None)
        assert not await outbox.flush(0.05)
        wire.open.set()
        assert await outbox.flush(5)
        assert outbox.blocked_at is None


async def test_connection_that_breaks_ends_all_who_wait() -> None:
    failing = asyncio.Event()

    async def send(_message: object) -> None:
        await failing.wait()
        raise ConnectionResetError

    async with Outbox(send, message_size) as outbox:
        await outbox.send(text("x" * BOUND))
        waiting = [asyncio.create_task(outbox.send(text("more"))) for _ in range(3)]
        await asyncio.sleep(0)
        failing.set()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, ConnectionError) for error in found)
        with pytest.raises(ConnectionError):
            await outbox.send(text("late"))
        assert not outbox.offer(text("ping"))
        assert not await outbox.flush(1)


async def test_socket_that_is_left_leaves_nobody_waiting() -> None:
    wire = Wire()
    async with Outbox(wire.send, message_size) as outbox:
        await outbox.send(text("x" * BOUND))
        waiting = asyncio.create_task(outbox.send(text("more")))
        await asyncio.sleep(0)
    with pytest.raises(ConnectionError):
        await waiting


class Client:
    """Takes what is written, as soon as the test lets it."""

    def __init__(self, *, open_: bool = True) -> None:
        self.taken: list[bytes] = []
        self.gate = asyncio.Event()
        self.error: Exception | None = None
        if open_:
            self.gate.set()

    async def write(self, data: bytes) -> None:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.taken.append(data)


async def test_what_comes_while_a_write_is_under_way_leaves_together_in_order() -> None:
    client = Client(open_=False)
    async with Outbox[bytes](client.write, len, b"".join) as outbox:
        await outbox.send((b"a",))
        await eventually(lambda: outbox.blocked_at is not None)
        for part in (b"b", b"c", b"d"):
            await outbox.send((part,))
        client.gate.set()
        assert await outbox.flush(5)
    assert client.taken == [b"a", b"bcd"]


async def test_beyond_the_bound_whoever_puts_waits_until_something_is_taken() -> None:
    client = Client(open_=False)
    async with Outbox[bytes](client.write, len, b"".join) as outbox:
        await outbox.send((b"first",))
        await eventually(lambda: outbox.blocked_at is not None)
        await outbox.send((b"x" * BOUND,))
        waiting = [asyncio.create_task(outbox.send((b"%d" % n,))) for n in range(3)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        assert not await outbox.flush(0.01)
        client.gate.set()
        await asyncio.gather(*waiting)
        assert await outbox.flush(5)
    assert b"".join(client.taken) == b"first" + b"x" * BOUND + b"012"


async def test_one_message_may_be_larger_than_the_bound() -> None:
    client = Client()
    async with Outbox[bytes](client.write, len, b"".join) as outbox:
        await outbox.send((b"x" * (3 * BOUND),))
        assert await outbox.flush(5)
    assert client.taken == [b"x" * (3 * BOUND)]


async def test_client_that_is_gone_is_said_to_whoever_puts() -> None:
    client = Client(open_=False)
    client.error = RuntimeError("gone")
    async with Outbox[bytes](client.write, len, b"".join) as outbox:
        await outbox.send((b"a",))
        await outbox.send((b"b" * BOUND,))
        waiting = asyncio.create_task(outbox.send((b"c" * BOUND,)))
        client.gate.set()
        with pytest.raises(ConnectionError):
            await waiting
        with pytest.raises(ConnectionError):
            await outbox.send((b"d",))
        assert not await outbox.flush(1)


async def test_leaving_the_block_ends_those_who_wait() -> None:
    client = Client(open_=False)
    async with Outbox[bytes](client.write, len, b"".join) as outbox:
        await outbox.send((b"a",))
        await eventually(lambda: outbox.blocked_at is not None)
        await outbox.send((b"b" * BOUND,))
        waiting = asyncio.create_task(outbox.send((b"c",)))
        await asyncio.sleep(0)
    with pytest.raises(ConnectionError):
        await waiting
    assert client.taken == []
