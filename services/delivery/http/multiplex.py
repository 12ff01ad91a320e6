"""Serve several sessions over one HTTP connection: one stream per session, one shared outbox."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from litestar.types import ASGIApp

from schemas.cursor import Cursor, InvalidCursor, session_mark
from services.delivery.fanout.streams import Stream, Streams
from services.delivery.fanout.subscriber import Send, Subscriber
from services.delivery.formats.granularity import Position
from services.delivery.formats.multi_cursor import MAX_SESSIONS, MultiCursor, parse_multi_cursor
from services.delivery.formats.multiplex import MultiplexFormat
from services.delivery.formats.raw import RawBye, RawFormat, RawGap, raw_event_of
from services.delivery.formats.sse import http_body
from services.delivery.http.asgi import STREAM_HEADERS, watching
from services.delivery.http.read_request import ReadRequest, last_event_id, read_options_of
from services.kit.auth.principal import Principal
from services.kit.http import RAW_SEND
from services.kit.problem import Problem

__all__ = ["OpenedStreams", "open_several", "streaming_several"]

QUIET_SHARE: Final = 0.5  # of the heartbeat interval: every session has its own heartbeat, one per interval is enough
_EXPIRED: Final = "expired"
_SILENT_ENDS: Final = frozenset({"disconnected", "evicted", "sibling", "failed"})


class OpenedStreams(NamedTuple):
    """Streams to serve over one connection, and the sessions whose cursor has expired."""

    streams: Sequence[Stream]
    expired: Sequence[str]


async def open_several(streams: Streams, principal: Principal, scope: Any, ask: ReadRequest) -> OpenedStreams:
    """Open a stream for each requested session.

    A session that is not in the cursor begins at its default position. A session whose position has expired does too,
    and is listed in ``expired``.

    Raises:
        Problem: 400, the request is not valid; otherwise the problem of a session that cannot be read.
    """
    _check(ask)
    cursors = _cursors_by_mark(last_event_id(scope) or ask.after)
    marks = [session_mark(principal.tenant, session) for session in ask.sessions]
    if len(set(marks)) < len(marks):
        raise Problem(400, "two of these sessions have the same mark in cursors: read them over separate connections")
    found = await asyncio.gather(
        *(
            _open(streams, principal, read_options_of({"headers": ()}, _for_one(ask, cursors.get(mark)), session))
            for session, mark in zip(ask.sessions, marks, strict=True)
        )
    )
    return OpenedStreams([stream for stream, _ in found], [s.options.session for s, expired in found if expired])


def streaming_several(
    streams: Streams, opened: OpenedStreams, form: MultiplexFormat, media_type: bytes, quiet: float
) -> ASGIApp:
    """Return the ASGI application that sends several sessions; ``quiet``: seconds of silence before a heartbeat."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", media_type), *STREAM_HEADERS]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        outbox = _SharedOutbox(opened, form, scope.get(RAW_SEND, send), quiet * QUIET_SHARE)
        await outbox.open()
        with watching(receive) as watch:
            reasons = await asyncio.gather(
                *(outbox.serve(streams, number, watch) for number in range(len(opened.streams)))
            )
        await outbox.close(next(reason for reason in reasons if reason != "sibling"))

    return answer


class _SharedOutbox:
    """The outbox of one connection: one write at a time, while the other streams wait and fall behind."""

    def __init__(self, opened: OpenedStreams, form: MultiplexFormat, send: Send, quiet: float) -> None:
        self._opened = opened
        self._form = form
        self._send = send
        self._quiet = quiet
        self._cursor = MultiCursor([Cursor.parse(stream.cursor) for stream in opened.streams])
        self._lock = asyncio.Lock()
        self._subscribers: list[Subscriber] = []
        self._ending = False
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()

    async def open(self) -> None:
        """Write the opening of the format and a gap for each session whose cursor has expired."""
        gaps = [self._form.gap(session, _EXPIRED, None) for session in self._opened.expired]
        if body := self._form.opening + b"".join(gaps):
            await self._send(http_body(body))

    async def serve(self, streams: Streams, number: int, watch: Any) -> str:
        """Serve one session until the first of all sessions ends; return the reason."""

        def joined(subscriber: Subscriber) -> None:
            self._subscribers.append(subscriber)
            if self._ending:
                subscriber.stop("sibling")
            elif len(self._subscribers) == 1:
                watch(subscriber)

        async def send(message: list[bytes]) -> None:
            await self._forward(number, message)

        format_ = RawFormat(self._form.protocol, heartbeats=True)
        try:
            return await streams.serve(self._opened.streams[number], send, format_, joined)
        finally:
            self._ending = True
            for subscriber in self._subscribers:
                subscriber.stop("sibling")

    async def close(self, reason: str) -> None:
        """Say how to go on, unless nobody is there any more."""
        if reason not in _SILENT_ENDS:
            await self._send(http_body(self._form.bye(reason, self._cursor.text()), more=False))

    async def _forward(self, number: int, message: list[bytes]) -> None:
        if not message and (self._lock.locked() or self._loop.time() - self._sent_at < self._quiet):
            return
        async with self._lock:
            # Only now: what others have sent meanwhile is part of the cursor.
            body = b"".join([self._encoded(number, frame) for frame in message]) if message else self._form.heartbeat
            if body:
                self._sent_at = self._loop.time()
                await self._send(http_body(body))

    def _encoded(self, number: int, frame: bytes) -> bytes:
        session = self._opened.streams[number].options.session
        if isinstance(frame, RawBye):
            return b""
        if isinstance(frame, RawGap):
            reason, _, generation = frame.decode().partition(" ")
            return self._form.gap(session, reason, generation or None)
        part = raw_event_of(frame)
        self._cursor.advance(number, Position(part.seq, part.offset))
        return self._form.event(session, self._cursor.text(), part.data)


async def _open(streams: Streams, principal: Principal, options: Any) -> tuple[Stream, bool]:
    try:
        return await streams.open(principal, options), False
    except Problem as problem:
        if problem.status != 410:
            raise
    return await streams.open(principal, options._replace(cursor=None)), True


def _check(ask: ReadRequest) -> None:
    if not 0 < len(ask.sessions) <= MAX_SESSIONS or len(set(ask.sessions)) < len(ask.sessions):
        raise Problem(400, f"name 1 to {MAX_SESSIONS} different sessions: session=a&session=b")
    if ask.generation is not None or ask.wait is not None or ask.limit is not None:
        raise Problem(400, "generation, wait and limit are for one session: use /v1/sessions/{session}/events")


def _cursors_by_mark(text: str | None) -> dict[str, Cursor]:
    if text is None:
        return {}
    try:
        return {cursor.session: cursor for cursor in parse_multi_cursor(text)}
    except InvalidCursor as error:
        raise Problem(400, str(error), slug="cursor-invalid", title="The cursor is not valid here") from error


def _for_one(ask: ReadRequest, cursor: Cursor | None) -> ReadRequest:
    return ReadRequest(
        after=cursor.text if cursor else None,
        from_=ask.from_,
        granularity=ask.granularity,
        coalesce=ask.coalesce,
    )
