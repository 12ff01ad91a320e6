"""Server-sent events and lines of JSON, over HTTP."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec

from bench.chaos.history import Got
from bench.chaos.pace import slow_for
from bench.chaos.protocols.wanted import SILENCE, Refused, Wanted

__all__ = ["EventLines", "read_lines", "read_sse"]


async def read_sse(wanted: Wanted) -> None:
    """Read server-sent events until the server ends the stream, or all expected events have arrived."""
    lines = EventLines(wanted)
    async with _opened(wanted, "text/event-stream") as response:
        async for line in response.content:
            lines.feed(line)
            if wanted.there():
                return


class EventLines:
    """Parse bytes as they arrive; skip lines that do not belong to an event, as those of a chunk or a head."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._rest = b""
        self._block: list[str] = []

    def feed(self, data: bytes) -> None:
        """Add the next bytes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            text = line.decode().rstrip("\r")
            if text:
                self._block.append(text)
            else:
                _take(self._wanted, self._block)
                self._block = []


def _take(wanted: Wanted, block: list[str]) -> None:
    fields = dict(line.split(": ", 1) for line in block if ": " in line and not line.startswith(":"))
    if "event" in fields:
        wanted.said(fields["event"], fields.get("data", ""))
    elif "id" in fields:
        wanted.got(Got(watch=-1, cursor=fields["id"], data=fields["data"]))


class _Line(msgspec.Struct):
    cursor: str | None = None
    event: msgspec.Raw = msgspec.Raw()
    type: str | None = None


async def read_lines(wanted: Wanted) -> None:
    """Read lines of JSON until the server ends the stream, or all expected events have arrived."""
    async with _opened(wanted, "application/x-ndjson") as response:
        async for line in response.content:
            if not line.strip():
                continue
            read = msgspec.json.decode(line, type=_Line)
            if read.cursor is not None and bytes(read.event):
                wanted.got(Got(watch=-1, cursor=read.cursor, data=bytes(read.event).decode()))
            elif read.type != "heartbeat":
                wanted.said(read.type or "", line.decode())
            if wanted.there():
                return


@asynccontextmanager
async def _opened(wanted: Wanted, media: str) -> AsyncIterator[aiohttp.ClientResponse]:
    query = {} if wanted.generation is None else {"generation": wanted.generation}
    headers = wanted.headers | {"Accept": media}
    if wanted.cursor is not None:
        headers["Last-Event-ID"] = wanted.cursor
    elif wanted.generation is None:
        query["from"] = "start"
    url = f"{wanted.url}/v1/sessions/{wanted.session}/events"
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=3, sock_read=slow_for(SILENCE))
    async with wanted.http.get(url, params=query, headers=headers, timeout=timeout) as response:
        if response.status not in (200, 204):
            raise Refused(response.status, await response.text())
        wanted.opened(response.status)
        if response.status == 204:
            wanted.over()
        yield response
