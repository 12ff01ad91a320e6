"""A client that opens a stream and does not read: the server must evict it, and it must be able to resume."""

import asyncio
import contextlib
import socket
from typing import Final
from urllib.parse import urlencode, urlsplit

from bench.chaos.pace import slow_for
from bench.chaos.protocols.streams import EventLines
from bench.chaos.protocols.wanted import Wanted

__all__ = ["read_late"]

BUFFER: Final = 4_096
"""Receive buffer of this client in bytes: the kernel's minimum."""
AWAKE: Final = 1 << 20
LEFT: Final = 4.0
"""Seconds to read the data under way; a client that was not evicted would receive more for ever."""
PIECE: Final = 65_536


async def read_late(wanted: Wanted, seconds: float) -> bool:
    """Request server-sent events, read only after ``seconds``; return whether the server ended the stream.

    Raises:
        OSError: the connection failed.
    """
    loop = asyncio.get_running_loop()
    address = urlsplit(wanted.url)
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        link.setblocking(False)
        async with asyncio.timeout(3):
            await loop.sock_connect(link, (address.hostname, address.port))
            await loop.sock_sendall(link, _request(wanted, address.netloc))
        await asyncio.sleep(seconds)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, AWAKE)
        lines, ended = EventLines(wanted), False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(slow_for(LEFT)):
                while not ended and not wanted.there():
                    try:
                        data = await loop.sock_recv(link, PIECE)
                    except OSError:
                        data = b""
                    ended = not data
                    lines.feed(data)
        return ended


def _request(wanted: Wanted, host: str) -> bytes:
    query = {"from": "start"} if wanted.generation is None else {"generation": wanted.generation}
    headers = wanted.headers | {"Host": host, "Accept": "text/event-stream"}
    if wanted.cursor is not None:
        query.pop("from", None)
        headers["Last-Event-ID"] = wanted.cursor
    target = f"/v1/sessions/{wanted.session}/events?{urlencode(query)}"
    return "".join([f"GET {target} HTTP/1.1\r\n", *(f"{k}: {v}\r\n" for k, v in headers.items()), "\r\n"]).encode()
