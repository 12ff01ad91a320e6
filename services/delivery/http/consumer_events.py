"""Serve the events of a durable consumer over HTTP: as a stream (server-sent events, NDJSON) or in batches."""

import asyncio
from contextlib import suppress
from typing import Any, Final, NamedTuple

import structlog
from litestar.types import ASGIApp

from services.delivery import metrics
from services.delivery.consumers.access import open_session
from services.delivery.consumers.pulling import PIECE_BYTES, SLICE, STREAM_BATCH, envelope, pulled
from services.delivery.consumers.registry import Consumers
from services.delivery.consumers.session import ConsumerSession, Delivery
from services.delivery.fanout.supervisor import Supervisor
from services.delivery.formats.ndjson import control_line
from services.delivery.formats.negotiation import negotiate
from services.delivery.formats.sse import HEADERS, control_frame
from services.delivery.http.query import parse_query
from services.delivery.http.read_request import header
from services.delivery.settings import Settings
from services.kit.auth.principal import Principal
from services.kit.clock import Clock
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem

__all__ = ["ConsumerEvents", "PullOptions", "parse_pull_options"]

log = structlog.get_logger()
BATCH: Final = 1_000
WAIT: Final = 30.0
_PARAMETERS: Final = ("ack", "batch", "wait")
_HEARTBEAT: Final = b": hb\n\n"
_ALIVE: Final = control_line("heartbeat", {})
_NDJSON: Final = (
    (b"content-type", b"application/x-ndjson; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
_JSON: Final = ((b"content-type", b"application/json"), (b"cache-control", b"no-store"))


class PullOptions(NamedTuple):
    """Options of a read. ``batch``: most events of one response, within ``wait`` seconds; ``None``: a stream."""

    ndjson: bool = False
    auto: bool = False
    batch: int | None = None
    wait: float = 0.0


def parse_pull_options(scope: dict[str, Any]) -> PullOptions:
    """Parse the query and the Accept header of a request.

    Raises:
        Problem: 400, a parameter is not valid.
    """
    try:
        query, _ = parse_query(scope, _PARAMETERS)
    except ValueError as error:
        raise Problem(400, str(error)) from error
    ack = query.get("ack", "explicit")
    if ack not in ("explicit", "auto"):
        raise Problem(400, f"ack={ack[:40]!r} is not one of: explicit, auto")
    if "wait" in query and "batch" not in query:
        raise Problem(400, "wait needs batch: a stream always waits")
    form = negotiate(header(scope, b"accept"), ["text/event-stream", "application/x-ndjson"])
    return PullOptions(
        ndjson=form == "application/x-ndjson",
        auto=ack == "auto",
        batch=int(_number(query, "batch", 1, BATCH, whole=True)) if "batch" in query else None,
        wait=_number(query, "wait", 0, WAIT) if "wait" in query else 0.0,
    )


def _number(query: dict[str, str], name: str, least: float, most: float, *, whole: bool = False) -> float:
    text = query[name]
    with suppress(ValueError):
        value = int(text) if whole else float(text)
        if least <= value <= most:
            return value
    raise Problem(400, f"{name}={text[:40]!r} is not a{' whole' if whole else ''} number from {least:g} to {most:g}")


class ConsumerEvents:
    """Serve ``GET /v1/consumers/{name}/events``."""

    def __init__(self, consumers: Consumers, supervisor: Supervisor, clock: Clock, settings: Settings) -> None:
        self._consumers = consumers
        self._supervisor = supervisor
        self._clock = clock
        self._heartbeat = settings.heartbeat

    async def open(self, scope: Any, principal: Principal, name: str) -> ASGIApp:
        """Check a request, open a consumer session and return the ASGI application that responds.

        Raises:
            Problem: the request is not valid, not allowed, or cannot be served.
        """
        shape = parse_pull_options(scope)
        self._supervisor.check(principal)
        session = await open_session(self._consumers, principal, name)

        async def answer(_scope: Any, receive: Any, send: Any) -> None:
            pull = _Pull(session, shape, send, self._clock, self._supervisor.end_of(principal.expires_at))
            watch = asyncio.create_task(_disconnected(receive, pull))
            try:
                with self._supervisor.supervise(principal, pull):
                    await (pull.stream(self._heartbeat) if shape.batch is None else pull.batch(shape.batch))
            finally:
                watch.cancel()
                await session.close()

        return answer


class _Pull:
    """Serve one request, as a stream or a batch, until the client disconnects or `stop` is called. Supervised."""

    def __init__(
        self, session: ConsumerSession, shape: PullOptions, send: Any, clock: Clock, end: tuple[float, str]
    ) -> None:
        self.until, self.until_reason = end
        self.blocked_at: float | None = None
        self._session = session
        self._shape = shape
        self._send = send
        self._clock = clock
        self._sent_at = 0.0
        self._over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._write_task: asyncio.Task[None] | None = None

    def stop(self, reason: str) -> None:
        """End the response; the first reason wins."""
        if not self._over.done():
            self._over.set_result(reason)
        if reason == "evicted" and self._write_task is not None:
            self._write_task.cancel()

    def poll(self, now: float) -> None:
        """Do nothing: heartbeats are written between two pulls."""

    async def batch(self, limit: int) -> None:
        """Send the available events, at most ``limit``; wait up to the requested seconds for the first one."""
        until = self._clock.monotonic() + self._shape.wait
        given: list[Delivery] = []
        try:
            while not given and not self._session.is_gone:
                left = until - self._clock.monotonic()
                given = await pulled(self._session, limit, max(0.0, min(SLICE, left)), self._over)
                if left <= 0 or self._over.done():
                    break
        except BrokerUnavailable:
            await _answer(self._send, 503, b'{"type":"urn:tailrace:problem:unavailable","status":503}')
            return
        if self._over.done() and self._over.result() in ("disconnected", "expired"):
            await self._session.nack(given)
            return
        body = b",".join(envelope(each, auto=self._shape.auto) for each in given)
        await _answer(self._send, 200, b'{"events":[' + body + b"]}")
        if self._shape.auto:
            await self._session.ack(given)

    async def stream(self, heartbeat: float) -> None:
        """Stream events to the end; ``heartbeat``: seconds without events before a heartbeat is sent."""
        headers = list(_NDJSON if self._shape.ndjson else HEADERS)
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        reason = "failed"
        try:
            await self._write(_ALIVE if self._shape.ndjson else b"retry: 1000\n\n")
            reason = await self._follow(heartbeat)
            if reason not in ("disconnected", "evicted"):
                await self._write(self._bye(reason), more=False)
        except _Evicted:
            reason = "evicted"
        finally:
            metrics.CLOSED.labels(reason).inc()

    async def _follow(self, heartbeat: float) -> str:
        while not self._over.done():
            if self._session.is_gone:
                return "deleted"
            try:
                given = await pulled(self._session, STREAM_BATCH, SLICE, self._over)
            except BrokerUnavailable as error:
                log.warning("consumer stream ended: log could not be read", detail=str(error))
                return "unavailable"
            if self._over.done():
                await self._session.nack(given)
            elif given:
                await self._give(given)
            elif self._clock.monotonic() - self._sent_at > heartbeat:
                await self._write(_ALIVE if self._shape.ndjson else _HEARTBEAT)
        return self._over.result()

    async def _give(self, given: list[Delivery]) -> None:
        """Write events in chunks of `PIECE_BYTES`: the HTTP server buffers several chunks for a slow client."""
        start, size, frames = 0, 0, list(map(self._framed, given))
        for stop, frame in enumerate(frames, 1):
            size += len(frame)
            if size < PIECE_BYTES and stop < len(frames):
                continue
            await self._write(b"".join(frames[start:stop]))
            if self._shape.auto:
                await self._session.ack(given[start:stop])
            start, size = stop, 0

    def _framed(self, delivery: Delivery) -> bytes:
        line = envelope(delivery, auto=self._shape.auto)
        return line + b"\n" if self._shape.ndjson else b"data: " + line + b"\n\n"

    def _bye(self, reason: str) -> bytes:
        fields = {"reason": reason}
        return control_line("bye", fields) if self._shape.ndjson else control_frame("bye", fields)

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        """Write one chunk.

        Raises:
            _Evicted: the supervisor evicted the client because the write stalled.
        """
        message = {"type": "http.response.body", "body": data, "more_body": more}
        self.blocked_at = self._clock.monotonic()
        self._write_task = asyncio.ensure_future(self._send(message))
        try:
            await self._write_task
        except asyncio.CancelledError:
            if self._over.done() and self._over.result() == "evicted" and self._write_task.cancelled():
                raise _Evicted from None
            raise
        finally:
            self._write_task.cancel()
            self.blocked_at = self._write_task = None
        self._sent_at = self._clock.monotonic()


class _Evicted(Exception):
    """The supervisor evicted the client because a write stalled."""


async def _disconnected(receive: Any, pull: _Pull) -> None:
    """Stop the pull when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
    pull.stop("disconnected")


async def _answer(send: Any, status: int, body: bytes) -> None:
    kind = _JSON if status == 200 else ((b"content-type", b"application/problem+json"),)
    headers = [*kind, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
