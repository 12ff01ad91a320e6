"""Test the outbox of one socket: complete messages, in order, within a bound, with slow and cancelled senders."""

import asyncio
from typing import Any

import pytest

from services.delivery.websocket.outbox import BOUND, SocketOutbox
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
    async with SocketOutbox(wire.send) as outlet:
        await asyncio.gather(*(outlet.send(text(f"{n}a") + text(f"{n}b")) for n in range(20)))
        assert await outlet.flush(5)
    assert wire.taken == [f"{n}{half}" for n in range(20) for half in "ab"]


async def test_senders_wait_while_the_outbox_is_full_and_are_served_in_order() -> None:
    wire = Wire()
    async with SocketOutbox(wire.send) as outlet:
        await outlet.send(text("x" * BOUND))
        waiting = [asyncio.create_task(outlet.send(text(f"{n}" * 40_000))) for n in range(6)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        assert not outlet.offer(text("ping"))
        assert outlet._size == BOUND
        wire.open.set()
        await asyncio.gather(*waiting)
        assert await outlet.flush(5)
    assert [data[0] for data in wire.taken] == ["x", "0", "1", "2", "3", "4", "5"]


async def test_a_cancelled_sender_gives_its_turn_to_the_next() -> None:
    wire = Wire()
    async with SocketOutbox(wire.send) as outlet:
        await outlet.send(text("x" * BOUND))
        first, second, third = (asyncio.create_task(outlet.send(text(name))) for name in "abc")
        await asyncio.sleep(0)
        first.cancel()
        wire.open.set()
        await eventually(lambda: outlet._size < BOUND)
        second.cancel()
        await asyncio.gather(first, second, third, return_exceptions=True)
        assert third.exception() is None
        assert await outlet.flush(5)
    assert wire.taken[-1] == "c"
    assert "a" not in wire.taken


async def test_blocked_at_is_set_while_the_client_does_not_read() -> None:
    wire = Wire()
    async with SocketOutbox(wire.send) as outlet:
        assert outlet.blocked_at is None
        await outlet.send(text("x"))
        await eventually(lambda: outlet.blocked_at is not None)
        assert not await outlet.flush(0.05)
        wire.open.set()
        assert await outlet.flush(5)
        assert outlet.blocked_at is None


async def test_a_broken_connection_raises_in_all_waiting_senders() -> None:
    failing = asyncio.Event()

    async def send(_message: object) -> None:
        await failing.wait()
        raise ConnectionResetError

    async with SocketOutbox(send) as outlet:
        await outlet.send(text("x" * BOUND))
        waiting = [asyncio.create_task(outlet.send(text("more"))) for _ in range(3)]
        await asyncio.sleep(0)
        failing.set()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, ConnectionError) for error in found)
        with pytest.raises(ConnectionError):
            await outlet.send(text("late"))
        assert not outlet.offer(text("ping"))
        assert not await outlet.flush(1)


async def test_leaving_the_block_raises_in_waiting_senders() -> None:
    wire = Wire()
    async with SocketOutbox(wire.send) as outlet:
        await outlet.send(text("x" * BOUND))
        waiting = asyncio.create_task(outlet.send(text("more")))
        await asyncio.sleep(0)
    with pytest.raises(ConnectionError):
        await waiting
