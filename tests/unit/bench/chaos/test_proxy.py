"""Test the proxy: a link forwards bytes, and can be cut, held and slowed."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvloop

from bench.chaos.proxy import Link
from bench.processes import free_port
from tests.conftest import eventually

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Echo:
    """A server that records its input and echoes it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.received = b""
        self.connections = 0
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while data := await reader.read(65_536):
            self.received += data
            writer.write(data)
            await writer.drain()
        writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    server = Echo()
    await server.open()
    yield server
    await server.close()


@pytest.fixture
async def link(echo: Echo) -> AsyncIterator[Link]:
    between = Link(free_port(), echo.port)
    await between.open()
    yield between
    await between.close()


async def say(link: Link, data: bytes) -> Streams:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    writer.write(data)
    await writer.drain()
    return reader, writer


async def test_bytes_pass_in_both_directions(link: Link) -> None:
    data = bytes(range(256)) * 4_000
    reader, writer = await say(link, data)
    async with asyncio.timeout(10):
        assert await reader.readexactly(len(data)) == data
    writer.close()


async def test_a_cut_breaks_connections_and_refuses_new_ones_until_it_is_healed(link: Link, echo: Echo) -> None:
    reader, _ = await say(link, b"a")
    async with asyncio.timeout(10):
        assert await reader.readexactly(1) == b"a"
        link.cut()
        assert await closed(reader)
        refused, _ = await say(link, b"b")
        assert await closed(refused)
        link.heal()
        again, writer = await say(link, b"c")
        assert await again.readexactly(1) == b"c"
    writer.close()
    assert echo.connections == 2
    assert echo.received == b"ac"


async def test_held_bytes_arrive_after_their_sender_disconnected(link: Link, echo: Echo) -> None:
    reader, writer = await say(link, b"a")
    async with asyncio.timeout(10):
        assert await reader.readexactly(1) == b"a"
        link.hold()
        writer.write(b"held")
        await writer.drain()
        writer.transport.abort()
        link.heal()
    await eventually(lambda: echo.received == b"aheld")


async def test_a_slow_link_delays_bytes(link: Link) -> None:
    link.slow(0.05)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    reader, writer = await say(link, b"a")
    async with asyncio.timeout(10):
        assert await reader.readexactly(1) == b"a"
    assert loop.time() - begun >= 0.1  # there and back; it may be more
    writer.close()


async def closed(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read(1) == b""
    except ConnectionResetError:
        return True


def test_held_bytes_of_a_cut_connection_are_dropped_without_an_error() -> None:
    """uvloop, which the runs use, refuses writes to an aborted connection, and asyncio would report that."""
    reported: list[str] = []

    async def cut_while_held() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context["message"]))
        server = Echo()
        await server.open()
        link = Link(free_port(), server.port)
        await link.open()
        reader, writer = await say(link, b"a")
        assert await reader.readexactly(1) == b"a"
        link.hold()
        writer.write(b"held")
        await writer.drain()
        await asyncio.sleep(0.05)  # most often the bytes are in the link by now; the test holds where they are not
        link.cut()
        await asyncio.sleep(0)
        link.heal()
        assert await closed(reader)
        await asyncio.sleep(0.05)
        await link.close()
        await server.close()

    uvloop.run(cut_while_held())
    assert reported == []
