"""The events of a durable consumer over HTTP: as a stream (server-sent events, NDJSON), or a batch at a time."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs

import msgspec
import structlog
from litestar.types import ASGIApp

from services.delivery import metrics
from services.delivery.consumers.access import open_session
from services.delivery.consumers.registry import Consumers
from services.delivery.consumers.session import ConsumerSession, Delivery
from services.delivery.formats.ndjson import control_line
from services.delivery.formats.sse import HEADERS, control_frame
from services.kit.auth.principal import Principal
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem

__all__ = [
    "PIECE_BYTES",
    "SLICE",
    "STREAM_BATCH",
    "ConsumerEvents",
    "Shape",
    "about",
    "envelope",
    "pulled",
    "wanted_shape",
]

log = structlog.get_logger()
STREAM_BATCH: Final = 200
"""Events taken for one write to a stream; in bytes they are bounded by what one pull may bring."""
PIECE_BYTES: Final = 65_536
BATCH: Final = 1_000
WAIT: Final = 30.0
SLICE: Final = 1.0
"""Seconds after which a stream looks whether it has to end."""
_PARAMETERS: Final = frozenset({"ack", "batch", "wait"})
_HEARTBEAT: Final = b": hb\n\n"
_ALIVE: Final = control_line("heartbeat", {})
_NDJSON: Final = (
    (b"content-type", b"application/x-ndjson; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
_JSON: Final = ((b"content-type", b"application/json"), (b"cache-control", b"no-store"))


class Shape(NamedTuple):
    """How events are wanted. ``batch``: so many at most in one answer, within ``wait`` seconds; ``None``: a stream."""

    ndjson: bool = False
    auto: bool = False
    batch: int | None = None
    wait: float = 0.0


def wanted_shape(scope: dict[str, Any]) -> Shape:
    """Return what a request asks for.

    Raises:
        Problem: 400, a part of it is not valid.
    """
    try:
        query = parse_qs(scope["query_string"].decode("ascii"), keep_blank_values=True, max_num_fields=20)
    except ValueError as error:
        raise Problem(400, str(error)) from error
    for name, values in query.items():
        if name not in _PARAMETERS:
            raise Problem(400, f"unknown query parameter {name[:40]!r}: use ack, batch, wait")
        if len(values) > 1:
            raise Problem(400, f"query parameter {name!r} stands more than once")
    ack = query.get("ack", ["explicit"])[0]
    if ack not in ("explicit", "auto"):
        raise Problem(400, f"ack={ack[:40]!r} is not one of: explicit, auto")
    if "wait" in query and "batch" not in query:
        raise Problem(400, "wait needs batch: a stream waits by itself")
    accept = dict(scope["headers"]).get(b"accept", b"").decode("latin-1")
    return Shape(
        ndjson="application/x-ndjson" in accept,
        auto=ack == "auto",
        batch=int(_number(query, "batch", 1, BATCH, whole=True)) if "batch" in query else None,
        wait=_number(query, "wait", 0, WAIT) if "wait" in query else 0.0,
    )


def _number(query: dict[str, list[str]], name: str, least: float, most: float, *, whole: bool = False) -> float:
    text = query[name][0]
    with suppress(ValueError):
        value = int(text) if whole else float(text)
        if least <= value <= most:
            return value
    raise Problem(400, f"{name}={text[:40]!r} is not a{' whole' if whole else ''} number from {least:g} to {most:g}")


def about(delivery: Delivery, *, auto: bool) -> dict[str, Any]:
    """Return what services get with an event; with ``auto`` there is no token, since nothing is to be settled."""
    fields: dict[str, Any] = {} if auto else {"token": delivery.token}
    fields |= {"session": delivery.session, "cursor": delivery.cursor, "deliveries": delivery.deliveries}
    if delivery.gap is not None:
        fields["gap"] = delivery.gap
    return fields


def envelope(delivery: Delivery, *, auto: bool) -> bytes:
    """Return one event as services get it, as a line of JSON: the stored bytes, and what belongs to the delivery."""
    data = delivery.data
    if b"\n" in data or b"\r" in data:
        data = msgspec.json.format(data, indent=-1)
    return msgspec.json.encode(about(delivery, auto=auto))[:-1] + b',"event":' + data + b"}"


class ConsumerEvents:
    """``GET /v1/consumers/{name}/events``."""

    def __init__(self, consumers: Consumers) -> None:
        self._consumers = consumers
        self._hub = consumers.hub

    async def open(self, scope: Any, principal: Principal, name: str) -> ASGIApp:
        """Check one request and return the answer to it, which streams.

        Raises:
            Problem: the wish cannot be met.
        """
        shape = wanted_shape(scope)
        self._hub.connections.check(principal)
        session = await open_session(self._consumers, principal, name)

        async def answer(_scope: Any, receive: Any, send: Any) -> None:
            watch = asyncio.create_task(_disconnected(receive))

            def end(_reason: str) -> None:
                watch.cancel()

            try:
                with self._hub.stream(principal, end):
                    if shape.batch is None:
                        await _Stream(self._consumers, session, shape, send, watch, principal).serve()
                    else:
                        await self._answer_batch(session, shape, send, watch)
            finally:
                watch.cancel()
                await session.close()

        return answer

    async def _answer_batch(self, session: ConsumerSession, shape: Shape, send: Any, watch: asyncio.Task[None]) -> None:
        until = self._hub.clock.monotonic() + shape.wait
        try:
            given: list[Delivery] = []
            while not given and not watch.done() and not session.is_gone:
                left = until - self._hub.clock.monotonic()
                given = await pulled(session, shape.batch or 1, max(0.0, min(SLICE, left)), watch)
                if left <= 0 or self._hub.draining:
                    break
        except BrokerUnavailable:
            await _say(send, 503, b'{"type":"urn:tailrace:problem:unavailable","status":503}')
            return
        if watch.done():
            await session.nack(given)
            return
        body = b",".join(envelope(each, auto=shape.auto) for each in given)
        await _say(send, 200, b'{"events":[' + body + b"]}")
        if shape.auto:
            await session.ack(given)


class _Stream:
    """One stream of events, until the client leaves or it has to end."""

    def __init__(
        self,
        consumers: Consumers,
        session: ConsumerSession,
        shape: Shape,
        send: Any,
        watch: asyncio.Task[None],
        principal: Principal,
    ) -> None:
        self._hub = consumers.hub
        self._session = session
        self._shape = shape
        self._send = send
        self._watch = watch
        self._until, self._end = self._hub.end_of(principal.expires_at)
        self._sent_at = 0.0

    async def serve(self) -> None:
        headers = list(_NDJSON if self._shape.ndjson else HEADERS)
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        reason = "failed"
        try:
            await self._write(_ALIVE if self._shape.ndjson else b"retry: 1000\n\n")
            reason = await self._follow()
            if reason != "disconnected":
                await self._write(self._bye(reason), more=False)
        except TimeoutError:
            reason = "evicted"
        finally:
            metrics.CLOSED.labels(reason).inc()

    async def _follow(self) -> str:
        while (reason := self._reason()) is None:
            try:
                given = await pulled(self._session, STREAM_BATCH, SLICE, self._watch)
            except BrokerUnavailable as error:
                log.warning("stream ended: the log cannot be read", detail=str(error))
                return "unavailable"
            if self._watch.done():
                await self._session.nack(given)
            elif given:
                await self._give(given)
            elif self._hub.clock.monotonic() - self._sent_at > self._hub.limits.heartbeat:
                await self._write(_ALIVE if self._shape.ndjson else _HEARTBEAT)
        return reason

    async def _give(self, given: list[Delivery]) -> None:
        """Write events in pieces: the HTTP server takes several pieces ahead of a slow client."""
        start, size, frames = 0, 0, list(map(self._framed, given))
        for stop, frame in enumerate(frames, 1):
            size += len(frame)
            if size < PIECE_BYTES and stop < len(frames):
                continue
            await self._write(b"".join(frames[start:stop]))
            if self._shape.auto:
                await self._session.ack(given[start:stop])
            start, size = stop, 0

    def _reason(self) -> str | None:
        """Return why the stream has to end; ``None`` while it may go on."""
        clock = self._hub.clock
        reasons: tuple[tuple[str, Callable[[], bool]], ...] = (
            ("expired", self._watch.cancelled),  # the key has been revoked
            ("disconnected", self._watch.done),
            ("drain", lambda: self._hub.draining),
            ("deleted", lambda: self._session.is_gone),
            (self._end, lambda: clock.monotonic() > self._until),
        )
        return next((reason for reason, holds in reasons if holds()), None)

    def _framed(self, delivery: Delivery) -> bytes:
        line = envelope(delivery, auto=self._shape.auto)
        return line + b"\n" if self._shape.ndjson else b"data: " + line + b"\n\n"

    def _bye(self, reason: str) -> bytes:
        fields = {"reason": reason}
        return control_line("bye", fields) if self._shape.ndjson else control_frame("bye", fields)

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(self._hub.limits.stall):
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._sent_at = self._hub.clock.monotonic()


async def pulled(session: ConsumerSession, limit: int, wait: float, watch: asyncio.Future[Any]) -> list[Delivery]:
    """Return what a pull brings; when ``watch`` ends before, what it had goes back, and nothing is returned."""
    pull = asyncio.create_task(session.pull(limit, wait))
    try:
        await asyncio.wait({pull, watch}, return_when=asyncio.FIRST_COMPLETED)
        if pull.done():
            return pull.result()
        return []
    finally:
        if not pull.done():
            pull.cancel()
            with suppress(asyncio.CancelledError, BrokerUnavailable):
                await pull


async def _disconnected(receive: Any) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _say(send: Any, status: int, body: bytes) -> None:
    kind = _JSON if status == 200 else ((b"content-type", b"application/problem+json"),)
    headers = [*kind, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
