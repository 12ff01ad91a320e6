"""Follow a session or a generation over SSE; resume lost connections without loss or duplicates."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final, NamedTuple

import httpx
import httpx_sse

from schemas.acceptance import Acceptance, Verdict
from schemas.codec import Header, MalformedEvent, UnknownEvent, decode_event, decode_header
from schemas.events import TERMINAL_TYPES, AnyEvent
from services.standalone.api import Api, refusal
from services.standalone.backoff import reconnect_delay
from services.standalone.errors import CommandFailed, Unreachable

__all__ = ["Received", "Start", "follow"]

MAX_FAILURES: Final = 8
"""Connections lost in a row, without an event between, after which `follow` gives up (about 25 s)."""
SILENCE: Final = 45.0
"""Seconds without a heartbeat (sent every 15 s) after which a connection counts as lost."""
REMEMBERED: Final = 64


class Received(NamedTuple):
    """An accepted event: cursor, JSON text, header, and the decoded event (``None`` for an unknown type)."""

    cursor: str
    data: str
    header: Header
    event: AnyEvent | None


class Start(NamedTuple):
    """Start position: after a cursor, ``start`` or ``live``; of the session, or of one generation until its end."""

    session: str
    generation: str | None = None
    after: str | None = None
    from_: str | None = None

    def query(self) -> dict[str, str]:
        """Return the query parameters of the first request."""
        wanted = {"generation": self.generation, "after": self.after, "from": None if self.after else self.from_}
        return {name: value for name, value in wanted.items() if value}


class _Session:
    """Apply the acceptance rule to the 64 most recent generations of a session.

    A generation whose first received event is in its middle, after a cursor or after a gap that delivery reported, is
    joined there: delivery has already determined the highest epoch.
    """

    def __init__(self) -> None:
        self._generations: dict[str, Acceptance] = {}

    def accepts(self, header: Header) -> bool:
        """Record an event; return whether the acceptance rule accepts it."""
        acceptance = self._generations.pop(header.generation, None) or Acceptance.joining(header.epoch)
        self._generations[header.generation] = acceptance
        if len(self._generations) > REMEMBERED:
            del self._generations[next(iter(self._generations))]
        return acceptance.offer(header) is Verdict.ACCEPTED

    def expect_gap(self) -> None:
        """Let each generation continue with any next seq: the events between are lost, and the gap was reported."""
        for acceptance in self._generations.values():
            acceptance.join(acceptance.epoch)


class _Line:
    """State kept across connections: last cursor, accepted positions, and failures in a row."""

    def __init__(self, start: Start, remark: Callable[[str], None]) -> None:
        self.start = start
        self.remark = remark
        self.cursor: str | None = None
        self.failures = 0
        self.finished = False
        self.session = _Session()


def follow(
    api: Api, start: Start, remark: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
) -> Iterator[Received]:
    """Yield accepted events; reconnect with the last id; return after the terminal event of a single generation.

    ``remark`` receives a line for lost connections and gaps.

    Raises:
        Unreachable: the first connection failed, or too many were lost in a row.
        Refused: the service rejected the request for this session or start position.
    """
    line = _Line(start, remark)
    connected_once = False
    while True:
        try:
            with _connect(api, line) as source:
                connected_once = connected_once or source.response.is_success
                yield from _receive(source, line)
        except httpx_sse.SSEError as error:
            raise CommandFailed(f"{api.url} does not answer like Tailrace: {error}") from error
        except httpx.TransportError as error:
            if not connected_once and isinstance(error, httpx.ConnectError):
                raise Unreachable(f"nothing answers at {api.url}: check that `tailrace up` is running") from error
        if line.finished:
            return
        line.failures += 1
        if line.failures > MAX_FAILURES:
            hint = f"; continue with: tailrace tail {start.session} --after {line.cursor}" if line.cursor else ""
            raise Unreachable(f"the connection to {api.url} was lost{hint}")
        if line.failures == 2:
            remark("connection lost, trying to resume …")
        sleep(reconnect_delay(line.failures, random.random()))


def _connect(api: Api, line: _Line) -> AbstractContextManager[httpx_sse.EventSource]:
    headers = {"last-event-id": line.cursor} if line.cursor else {}
    query = line.start.query()
    if line.cursor:
        query.pop("after", None)
        query.pop("from", None)
    timeout = httpx.Timeout(SILENCE, connect=5.0)
    path = f"/v1/sessions/{line.start.session}/events"
    return httpx_sse.connect_sse(api.client, "GET", path, params=query, headers=headers, timeout=timeout)


def _receive(source: httpx_sse.EventSource, line: _Line) -> Iterator[Received]:
    response = source.response
    if response.status_code == 204:
        line.finished = True
        return
    if response.is_server_error or response.status_code == 429:
        return  # temporary: retry
    if response.is_error:
        response.read()
        raise refusal(response)
    for sse in source.iter_sse():
        if sse.event == "bye":
            return
        if sse.event == "gap":
            line.remark(f"gap: events are missing here: {sse.data}")
            line.session.expect_gap()
        if sse.event != "message" or not sse.data:  # the library also reports a lone "retry"
            continue
        line.cursor, line.failures = sse.id or line.cursor, 0
        if (received := _judge(sse, line.session)) is None:
            continue
        line.finished = line.start.generation is not None and received.header.type in TERMINAL_TYPES
        yield received
        if line.finished:
            return


def _judge(sse: httpx_sse.ServerSentEvent, session: _Session) -> Received | None:
    data = sse.data.encode()
    try:
        header = decode_header(data)
        if not session.accepts(header):
            return None
        return Received(sse.id, sse.data, header, decode_event(data))
    except UnknownEvent:
        return Received(sse.id, sse.data, header, None)
    except MalformedEvent:
        return None
