"""Test the outbox of one gRPC call."""

import asyncio

import pytest

from services.delivery.grpc.outbox import BOUND, CallOutbox
from tests.conftest import eventually


class Client:
    """A client that accepts writes when the test opens its gate."""

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


async def test_parts_put_during_a_write_are_sent_together_in_order() -> None:
    client = Client(open_=False)
    async with CallOutbox(client.write) as outbox:
        await outbox.put(b"a")
        await eventually(lambda: outbox.writing_since is not None)
        for part in (b"b", b"c", b"d"):
            await outbox.put(part)
        client.gate.set()
        assert await outbox.flush(5)
    assert client.taken == [b"a", b"bcd"]


async def test_put_waits_while_the_outbox_is_full() -> None:
    client = Client(open_=False)
    async with CallOutbox(client.write) as outbox:
        await outbox.put(b"first")
        await eventually(lambda: outbox.writing_since is not None)
        await outbox.put(b"x" * BOUND)
        waiting = [asyncio.create_task(outbox.put(b"%d" % n)) for n in range(3)]
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
    async with CallOutbox(client.write) as outbox:
        await outbox.put(b"x" * (3 * BOUND))
        assert await outbox.flush(5)
    assert client.taken == [b"x" * (3 * BOUND)]


async def test_put_raises_connection_error_after_the_client_is_gone() -> None:
    client = Client(open_=False)
    client.error = RuntimeError("gone")
    async with CallOutbox(client.write) as outbox:
        await outbox.put(b"a")
        await outbox.put(b"b" * BOUND)
        waiting = asyncio.create_task(outbox.put(b"c" * BOUND))
        client.gate.set()
        with pytest.raises(ConnectionError):
            await waiting
        with pytest.raises(ConnectionError):
            await outbox.put(b"d")
        assert not await outbox.flush(1)


async def test_leaving_the_block_raises_connection_error_in_waiting_puts() -> None:
    client = Client(open_=False)
    async with CallOutbox(client.write) as outbox:
        await outbox.put(b"a")
        await eventually(lambda: outbox.writing_since is not None)
        await outbox.put(b"b" * BOUND)
        waiting = asyncio.create_task(outbox.put(b"c"))
        await asyncio.sleep(0)
    with pytest.raises(ConnectionError):
        await waiting
    assert client.taken == []
