"""Server-sent events: a raw ASGI answer, written to by the feed and not by a task per event."""

import asyncio
from typing import Any, Final
from urllib.parse import parse_qs

import structlog
from litestar.types import ASGIApp

from schemas.names import InvalidName, check_name
from services.delivery import metrics
from services.delivery.core import sse
from services.delivery.core.start import Start, check_cursor, wanted_start
from services.delivery.errors import CursorExpired, CursorForeign, DeliveryError, TooBusy, Unknown
from services.delivery.feed import Feed
from services.delivery.hub import Hub
from services.delivery.lookups import Lookups
from services.delivery.subscriber import Subscriber
from services.kit.broker import BrokerUnavailable
from services.kit.problem import Problem

__all__ = ["RAW_SEND", "SessionEvents", "Wish"]

log = structlog.get_logger()
RAW_SEND: Final = "tailrace.send"
RETRY_MS: Final = 1_000
LAST_WRITE_SECONDS: Final = 5.0
_PARAMETERS: Final = frozenset({"after", "from", "generation"})


class Wish:
    """What a subscriber asks for, checked: session, generation, cursor text and start."""

    def __init__(self, scope: dict[str, Any]) -> None:
        headers = dict(scope["headers"])
        try:
            query = parse_qs(scope["query_string"].decode("ascii"), keep_blank_values=True, max_num_fields=20)
            self.session = check_name("session", scope["path_params"]["session"])
            generation = _single(query, "generation")
            self.generation = None if generation is None else check_name("generation", generation)
            last_event_id = headers.get(b"last-event-id", b"").decode("latin-1") or None
            self.cursor, self.start = wanted_start(_single(query, "after"), last_event_id, _single(query, "from"))
        except (InvalidName, ValueError) as error:
            raise Problem(400, str(error)) from error
        unknown = sorted(set(query) - _PARAMETERS)
        if unknown:
            raise Problem(400, f"unknown query parameter {unknown[0][:40]!r}: use after, from, generation")


def _single(query: dict[str, list[str]], name: str) -> str | None:
    values = query.get(name)
    if values is None:
        return None
    if len(values) > 1:
        raise ValueError(f"query parameter {name!r} stands more than once")
    return values[0]


class SessionEvents:
    """``GET /v1/sessions/{session}/events``."""

    def __init__(self, hub: Hub, lookups: Lookups, tenant: str) -> None:
        self._hub = hub
        self._lookups = lookups
        self._tenant = tenant

    async def open(self, scope: Any) -> ASGIApp:
        """Check one request and return the answer to it, which streams.

        Raises:
            Problem: the wish cannot be met.
        """
        wish = Wish(scope)
        if self._hub.draining:
            raise Problem(503, "this replica is going away", headers={"Retry-After": "1"})
        try:
            feed, seq = await self._locate(wish)
        except DeliveryError as error:
            raise _problem(error) from error
        except BrokerUnavailable as error:
            raise Problem(503, "the log cannot be reached", headers={"Retry-After": "1"}) from error

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            if seq is None:
                await send({"type": "http.response.start", "status": 204, "headers": [(b"cache-control", b"no-store")]})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            await send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
            subscriber = Subscriber(scope.get(RAW_SEND, send), sse.frame, wish.generation, seq)
            subscriber.until = self._hub.lifetime()
            presence = self._hub.presence.listening(feed.tenant, feed.session, wish.generation)
            with self._hub.stream():
                async with presence:
                    await self._serve(feed, subscriber, receive, fresh=wish.cursor is None)

        return answer

    async def _locate(self, wish: Wish) -> tuple[Feed, int | None]:
        """Return the feed and the stream sequence after which to read; ``None`` when all has been read already."""
        if wish.generation is not None:
            await self._lookups.require(self._tenant, wish.session, wish.generation)
        feed = await self._hub.feed(self._tenant, wish.session)
        if wish.cursor is not None:
            seq = await self._check(wish.cursor, feed)
            await feed.reach(seq)
        else:
            seq = await self._beginning(feed, wish.generation, wish.start)
            if wish.start.where != "live":
                return feed, seq
        if wish.generation is not None and await self._ended(feed, wish.generation, seq):
            return feed, None
        return feed, seq

    async def _check(self, cursor: str, feed: Feed) -> int:
        state = await self._hub.state(feed.issuer.partition)
        try:
            return check_cursor(cursor, feed.issuer, state.first_seq, max(state.last_seq, feed.last_seq))
        except CursorExpired:
            state = await self._hub.state(feed.issuer.partition, fresh=True)
            return check_cursor(cursor, feed.issuer, state.first_seq, max(state.last_seq, feed.last_seq))

    async def _ended(self, feed: Feed, generation: str, seq: int) -> bool:
        reader = self._hub.reader(feed.tenant, feed.session, feed.issuer.partition)
        return (await reader.position_before(generation, seq + 1)).ended

    async def _beginning(self, feed: Feed, generation: str | None, start: Start) -> int:
        if start.where == "live":
            return feed.last_seq
        if generation is not None:
            span = feed.tail.spans.get(generation)
            if span is not None and span.first > feed.tail.floor:
                return span.first - 1
            seen = feed.last_seq  # before asking: what is stored meanwhile must not be skipped
            first = await self._hub.reader(feed.tenant, feed.session, feed.issuer.partition).first_of(generation)
            return seen if first is None else first - 1
        return 0 if start.where == "start" else feed.latest_start()

    async def _serve(self, feed: Feed, subscriber: Subscriber, receive: Any, *, fresh: bool) -> None:
        metrics.SUBSCRIBERS.labels("sse").inc()
        feed.hold(subscriber)
        watch = asyncio.create_task(_watch(receive, subscriber))
        reason = "failed"
        try:
            opening = sse.retry_frame(RETRY_MS)
            if fresh and subscriber.seq >= feed.tail.floor and feed.is_headless(subscriber.generation):
                opening += sse.gap_frame("beginning_expired", subscriber.generation)
            await subscriber.send(_body(opening))
            reason = await self._follow(feed, subscriber)
            await self._say_goodbye(feed, subscriber, reason)
        except BrokerUnavailable as error:
            log.warning("stream ended: the log cannot be read", session=feed.session, detail=str(error))
            await self._say_goodbye(feed, subscriber, "unavailable")
        finally:
            feed.remove(subscriber)
            watch.cancel()
            await subscriber.close()
            metrics.SUBSCRIBERS.labels("sse").dec()
            metrics.CLOSED.labels(reason).inc()

    async def _follow(self, feed: Feed, subscriber: Subscriber) -> str:
        """Serve from the log and from memory in turn until the stream is to end; return why."""
        while True:
            if self._hub.draining:
                subscriber.finish("drain")
            if feed.closed:
                subscriber.finish("lifetime")
            if subscriber.seq < feed.tail.floor:
                if await self._hub.catch_up(feed, subscriber):
                    return "complete"
                if subscriber.seq < feed.tail.floor and not subscriber.done.done():
                    continue
            if not subscriber.done.done():
                feed.add(subscriber)
            reason = await subscriber.done
            if reason != "behind":
                return reason
            feed.hold(subscriber)
            if not await subscriber.through(self._hub.limits.stall):
                return "evicted"
            subscriber.rearm()

    async def _say_goodbye(self, feed: Feed, subscriber: Subscriber, reason: str) -> None:
        if reason in ("complete", "disconnected", "evicted"):
            return
        if reason == "terminal":
            await subscriber.through(self._hub.limits.stall)
            return
        if not await subscriber.through(LAST_WRITE_SECONDS):
            return
        cursor = feed.issuer.issue(subscriber.seq)
        frame = sse.control_frame("bye", {"reason": reason, "cursor": cursor})
        if reason == "gap":
            frame = sse.gap_frame("log_recreated")
        await subscriber.send(_body(frame, more=False))
        await subscriber.through(LAST_WRITE_SECONDS)


async def _watch(receive: Any, subscriber: Subscriber) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            subscriber.finish("disconnected")
            return


def _body(data: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def _problem(error: DeliveryError) -> Problem:
    match error:
        case CursorForeign():
            return Problem(400, str(error), slug="cursor-invalid", title="The cursor is not valid here")
        case CursorExpired():
            return Problem(410, str(error), slug="cursor-expired", title="The cursor has expired")
        case Unknown():
            return Problem(404, str(error))
        case TooBusy():
            return Problem(503, str(error), headers={"Retry-After": "2"})
        case _:
            return Problem(500, "the error has been logged")
