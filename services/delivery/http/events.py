"""Serve events over HTTP: one resource in several formats, chosen by content negotiation."""

from collections.abc import Awaitable
from typing import Any, Final

import msgspec
from litestar.types import ASGIApp

from services.delivery.errors import named, reach
from services.delivery.fanout.streams import ReadOptions, Streams
from services.delivery.formats.format import Format
from services.delivery.formats.gzip import Gzipped, takes_gzip
from services.delivery.formats.multiplex import MULTIPLEX_NDJSON, MULTIPLEX_SSE, MultiplexFormat
from services.delivery.formats.ndjson import NDJSON
from services.delivery.formats.negotiation import negotiate
from services.delivery.formats.sse import SSE
from services.delivery.http.asgi import streaming, whole
from services.delivery.http.completion import Completion
from services.delivery.http.long_poll import BATCH_EVENTS, MAX_EVENTS, polling
from services.delivery.http.multiplex import open_several, streaming_several
from services.delivery.http.read_request import COMPLETE, ReadRequest, header, read_options_of
from services.delivery.http.responses import start_headers
from services.delivery.requests.generations import Lookups
from services.delivery.requests.views import view_of
from services.kit.auth.principal import Principal, principal_of
from services.kit.problem import Problem
from services.kit.tasks import together

__all__ = ["SessionEvents", "start_form"]

_JSON: Final = "application/json"
_STREAMS: Final[dict[str, tuple[Format, MultiplexFormat, bytes]]] = {
    "text/event-stream": (SSE, MULTIPLEX_SSE, b"text/event-stream; charset=utf-8"),
    "application/x-ndjson": (NDJSON, MULTIPLEX_NDJSON, b"application/x-ndjson"),
    "application/ndjson": (NDJSON, MULTIPLEX_NDJSON, b"application/ndjson"),
}
_GZIPPED: Final = {SSE: Gzipped(SSE), NDJSON: Gzipped(NDJSON)}  # one object per format, so that feeds compress once


class SessionEvents:
    """Respond to ``…/sessions/{session}/events`` and ``/events``.

    ``max_wait``: longest wait of a poll in seconds; ``heartbeat``: seconds of silence before a heartbeat;
    ``compress``: whether to send gzip to clients that accept it.
    """

    def __init__(
        self,
        streams: Streams,
        lookups: Lookups,
        completion: Completion,
        *,
        max_wait: float,
        heartbeat: float,
        compress: bool = False,
    ) -> None:
        self._compress = compress
        self._streams = streams
        self._lookups = lookups
        self._completion = completion
        self._max_wait = max_wait
        self._heartbeat = heartbeat

    async def of_session(self, scope: Any, receive: Any, ask: ReadRequest, session: str) -> ASGIApp:
        """Return the ASGI application that sends one session's events.

        Raises:
            Problem: the request is not valid or cannot be served.
        """
        principal = principal_of(scope)
        media_type = _form(scope, [_JSON] if ask.wait is not None else [*_STREAMS, _JSON])
        if ask.wait == COMPLETE:
            return await self._complete(principal, receive, ask, session)
        wait = min(ask.seconds or 0.0, self._max_wait)
        limit = _limit(ask)
        stream = await self._streams.open(principal, read_options_of(scope, ask, session))
        gzip = self._compress and takes_gzip(header(scope, b"accept-encoding"))
        if media_type == _JSON:
            return polling(self._streams, stream, wait, limit, gzip=gzip)
        format_, _, content_type = _STREAMS[media_type]
        if gzip:
            return streaming(self._streams, stream, _GZIPPED[format_], content_type, gzip=True)
        return streaming(self._streams, stream, format_, content_type)

    def check(self, principal: Principal, session: str) -> None:
        """Check that a principal may open a stream of a session now, before a request is queued for it.

        Raises:
            Problem: 403, 429 or 503.
        """
        self._streams.check(principal, session)

    async def of_start(
        self, scope: Any, session: str, media_type: str, options: ReadOptions, accept: Awaitable[tuple[str, str, bool]]
    ) -> ASGIApp:
        """Return the answer to a start whose response is the stream of its generation.

        The feed is opened while ``accept`` queues the request. ``accept`` returns the generation, the cursor before it,
        and whether the start is a repeat.

        Raises:
            Problem: the start is refused, or the stream cannot be opened.
        """
        principal = principal_of(scope)

        async def accepting() -> tuple[str, str, bool]:
            return await reach(accept)

        (generation, cursor, repeated), _ = await together(
            accepting(), self._streams.prepare(principal.tenant, session)
        )
        headers = start_headers(session, generation, cursor, repeated)
        try:
            stream = await self._streams.open(principal, options._replace(generation=generation))
        except Problem as problem:  # the request is queued: say where its stream is
            problem.headers |= {name.decode(): value.decode() for name, value in headers}
            raise
        format_, _, content_type = _STREAMS[media_type]
        gzip = self._compress and takes_gzip(header(scope, b"accept-encoding"))
        if gzip:
            return streaming(self._streams, stream, _GZIPPED[format_], content_type, gzip=True, headers=headers)
        return streaming(self._streams, stream, format_, content_type, headers=headers)

    async def of_several(self, scope: Any, ask: ReadRequest) -> ASGIApp:
        """Return the ASGI application that sends the events of several sessions.

        Raises:
            Problem: the request is not valid or cannot be served.
        """
        _, form, content_type = _STREAMS[_form(scope, [*_STREAMS])]
        opened = await open_several(self._streams, principal_of(scope), scope, ask)
        return streaming_several(self._streams, opened, form, content_type, self._heartbeat)

    async def _complete(self, principal: Principal, receive: Any, ask: ReadRequest, session: str) -> ASGIApp:
        if ask.generation is None:
            raise Problem(400, "wait=complete needs a generation: add generation=…")
        named("generation", ask.generation)
        ended = await self._completion.wait(principal, session, ask.generation, receive)
        view = await reach(view_of(self._lookups, principal.tenant, session, ask.generation))
        return whole(200 if ended else 202, msgspec.json.encode(view), _JSON)


def start_form(scope: Any) -> str | None:
    """Return the media type of the stream that a request to start asks for, or ``None`` if it asks for JSON."""
    media_type = negotiate(header(scope, b"accept"), [_JSON, *_STREAMS])
    return media_type if media_type in _STREAMS else None


def _form(scope: Any, offered: list[str]) -> str:
    media_type = negotiate(header(scope, b"accept"), offered)
    if media_type is None:
        raise Problem(406, f"the events have no format that the request accepts: accept one of {', '.join(offered)}")
    return media_type


def _limit(ask: ReadRequest) -> int:
    if ask.limit is None:
        return BATCH_EVENTS
    if not 1 <= ask.limit <= MAX_EVENTS:
        raise Problem(400, f"limit={ask.limit} is not within 1 to {MAX_EVENTS}")
    return ask.limit
