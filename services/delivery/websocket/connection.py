"""Serve one WebSocket: its requests, its subscriptions and its end."""

import asyncio
from typing import Any, Final, NamedTuple

import msgspec
import structlog

from schemas.cursor import InvalidCursor
from services.delivery import metrics
from services.delivery.consumers.registry import Consumers
from services.delivery.errors import named, reach
from services.delivery.fanout.feed import LAST_WRITE_SECONDS
from services.delivery.fanout.outbox import Outbox
from services.delivery.fanout.streams import ReadOptions, Streams
from services.delivery.fanout.supervisor import Supervisor
from services.delivery.formats.websocket import Formats, frame_message, position_of
from services.delivery.formats.websocket_messages import (
    Accepted,
    Ack,
    Cancel,
    Cancelling,
    Consume,
    Credit,
    End,
    Error,
    Ping,
    Pong,
    RequestId,
    Settle,
    StartGeneration,
    StartSubscription,
    Subscribe,
    Subscribed,
    Unconsume,
    Unreadable,
    Unsubscribe,
)
from services.delivery.requests.intake import GenerationRequest, Intake
from services.delivery.websocket.consumptions import Consumptions
from services.delivery.websocket.subscription import Subscription
from services.delivery.websocket.token_bucket import TokenBucket
from services.kit.auth.principal import Principal, authorize
from services.kit.clock import Clock
from services.kit.problem import Problem
from services.kit.request_head import BodyLimit
from services.kit.tasks import together

__all__ = ["CLOSES", "Connection", "SocketContext"]

log = structlog.get_logger()
SUBSCRIPTIONS: Final = 64
OPERATIONS: Final = 8
RATE: Final = 200.0
BURST: Final = 400.0
COSTLY: Final = 10.0  # messages that one invalid message, or one that needs the broker, counts as
SILENT_HEARTBEATS: Final = 3.0
KEY_LIMIT: Final = 200
CLOSES: Final[dict[str, tuple[int, str]]] = {
    "drain": (1001, "this replica stops: connect again"),
    "lifetime": (1001, "sockets do not last for ever: connect again"),
    "too-large": (1009, "a message has at most {0} bytes: {1} sets the limit"),
    "failed": (1011, "the error has been logged"),
    "expired": (4401, "the credentials have expired"),
    "silent": (4408, "no pong came"),
    "evicted": (4408, "nothing was read for too long"),
}
_ENDS: Final = {"complete": "complete", "terminal": "complete", "gap": "gap", "deleted": "gap", "failed": "failed"}
_ABOUT_ONE: Final = (Ack, Credit, Unsubscribe)
_EXPENSIVE: Final = (Subscribe, StartGeneration, Cancel, Consume, Unreadable)
_ABOUT_A_CONSUMER: Final = (Credit, Unconsume)
TOKENS_OF_A_MESSAGE: Final = 100.0  # this number of tokens to settle counts as one more message


class SocketContext(NamedTuple):
    """Objects shared by all sockets of a process. ``heartbeat``: seconds between pings; ``max_message``: size limit."""

    clock: Clock
    supervisor: Supervisor
    heartbeat: float
    streams: Streams
    intake: Intake
    consumers: Consumers
    max_message: BodyLimit


class Connection:
    """Serve one accepted socket. Supervised."""

    def __init__(
        self, desk: SocketContext, principal: Principal, formats: Formats, outbox: Outbox[dict[str, Any]]
    ) -> None:
        self._context = desk
        self._principal = principal
        self._formats = formats
        self._dialect = formats.dialect
        self._outbox = outbox
        self._clock = desk.clock
        now = self._clock.monotonic()
        self.until, self.until_reason = desk.supervisor.end_of(principal.expires_at)
        self._bucket = TokenBucket(RATE, BURST, now)
        self._heard_at = self._asked_at = now
        self._pings = 0
        self._subscriptions: dict[str, Subscription] = {}  # bounded by SUBSCRIPTIONS
        self._consumptions = Consumptions(desk.consumers, principal, formats.dialect, outbox, _error)
        self._operations: set[asyncio.Task[None]] = set()  # bounded by OPERATIONS
        self._over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self, receive: Any) -> str:
        """Serve the socket to its end; return the reason."""
        reading = asyncio.create_task(self._read(receive), name="websocket-reader")
        try:
            await asyncio.wait({reading, self._over}, return_when=asyncio.FIRST_COMPLETED)
            if self._over.done():
                return self._over.result()
            return reading.result()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def stop(self, reason: str) -> None:
        """End the socket; the first reason wins."""
        if not self._over.done():
            self._over.set_result(reason)

    async def end(self, reason: str) -> None:
        """End all subscriptions and operations, so that each subscription sends its last cursor."""
        if reason in ("too-large", "failed"):
            reason = "disconnected"
        tasks = self._tasks()
        self._consumptions.stop(reason)
        for subscription in list(self._subscriptions.values()):
            subscription.stop(reason)
        if reason in ("evicted", "silent"):
            return
        if tasks:
            await asyncio.wait(tasks, timeout=2 * LAST_WRITE_SECONDS)
        await self._outbox.flush(LAST_WRITE_SECONDS)

    async def abandon(self) -> None:
        """Cancel all tasks that have not ended."""
        tasks = self._tasks()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _tasks(self) -> set[asyncio.Task[None]]:
        reading = {s.task for s in self._subscriptions.values() if s.task is not None}
        return reading | self._consumptions.tasks | self._operations

    @property
    def blocked_at(self) -> float | None:
        """Since when a write has waited for the client."""
        return self._outbox.blocked_at

    def poll(self, now: float) -> None:
        """Ping the client, and end the socket when it does not answer."""
        heartbeat = self._context.heartbeat
        if self._asked_at > self._heard_at and now - self._heard_at > SILENT_HEARTBEATS * heartbeat:
            self.stop("silent")
        elif now - self._asked_at >= heartbeat:
            self._pings += 1
            self._asked_at = now
            self._outbox.offer([self._message(Ping(id=self._pings))])

    def _message(self, message: msgspec.Struct) -> dict[str, Any]:
        return frame_message(self._dialect.encode(message), self._dialect.text)

    async def _send(self, message: msgspec.Struct) -> None:
        await self._outbox.send([self._message(message)])

    async def _read(self, receive: Any) -> str:
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                return "disconnected"
            self._heard_at = self._clock.monotonic()
            text = message.get("text")
            data: str | bytes = (message.get("bytes") or b"") if text is None else text
            if _size(data) > self._context.max_message.size:
                return "too-large"
            message = self._dialect.decode(data)
            metrics.SOCKET_MESSAGES.labels(type(message).__name__.lower()).inc()
            wait = self._bucket.take(_cost(message), self._heard_at)
            if wait:
                metrics.SOCKET_THROTTLED.inc()
                await asyncio.sleep(wait)
            try:
                await self._answer(message)
            except ConnectionError:
                return "disconnected"

    async def _answer(self, message: Any) -> None:
        if message.id is None and self._has_ended(message):
            return  # the client sent it before it received the end
        try:
            await self._take(message)
        except Problem as problem:
            await self._send(_error(problem, message))

    def _has_ended(self, message: Any) -> bool:
        """Return whether a message names a subscription or consumer that is not read (any more)."""
        if isinstance(message, _ABOUT_A_CONSUMER) and message.consumer is not None:
            return message.consumer not in self._consumptions
        return (
            isinstance(message, _ABOUT_ONE)
            and message.session is not None
            and message.session not in self._subscriptions
        )

    async def _take(self, message: Any) -> None:
        match message:
            case Ack():
                self._acknowledge(message)
            case Consume() | Settle() | Unconsume():
                await self._take_for_consumer(message)
            case Credit() if message.consumer is not None:
                self._consumptions.grant(message)
            case Credit():
                self._subscription(message.session).flow.grant(message.events, message.bytes)
            case Subscribe():
                self._subscribe(message)
            case Unsubscribe():
                subscription = self._subscription(message.session)
                subscription.unsubscribed = True
                subscription.stop("disconnected")
            case StartGeneration():
                await self._operate(message, self._start(message))
            case Cancel():
                await self._operate(message, self._cancel(message))
            case Ping():
                await self._send(Pong(id=message.id))
            case Pong():
                self._take_pong(message)
            case Unreadable():
                raise Problem(400, message.detail, slug=message.slug)

    async def _take_for_consumer(self, message: Consume | Settle | Unconsume) -> None:
        match message:
            case Consume():
                self._consumptions.consume(message)
            case Settle():
                await self._operate(message, self._consumptions.settle(message))
            case Unconsume():
                self._consumptions.unconsume(message)

    def _take_pong(self, pong: Pong) -> None:
        if pong.id == self._pings:
            for subscription in self._subscriptions.values():
                subscription.flow.trip(self._heard_at - self._asked_at)

    def _subscription(self, session: str | None) -> Subscription:
        if session is None:
            raise Problem(400, "credit needs `session` or `consumer`")
        found = self._subscriptions.get(session)
        if found is None:
            raise Problem(404, f"this socket has no subscription of session {session[:80]!r}")
        return found

    def _acknowledge(self, message: Ack) -> None:
        subscription = self._subscription(message.session)
        try:
            position = position_of(message.cursor)
        except InvalidCursor as error:
            raise Problem(400, str(error), slug="cursor-invalid", title="The cursor is not valid here") from error
        subscription.flow.acked(position)

    def _subscribe(self, message: Subscribe) -> None:
        options = ReadOptions.read(
            message.session,
            generation=message.generation,
            after=message.after,
            from_=message.from_,
            granularity=message.granularity,
            coalesce=message.coalesce,
        )
        subscription = self._reserve(message.session, message)
        subscription.task = asyncio.create_task(self._follow(message.id, options, subscription))

    def _reserve(self, session: str, limits: Subscribe | StartSubscription) -> Subscription:
        """Return a new subscription of a session, which the socket counts from now on.

        Raises:
            Problem: 409, the session is read already; 429, the socket has too many subscriptions; 400, wrong limits.
        """
        if session in self._subscriptions:
            raise Problem(409, f"this socket reads session {session!r} already: unsubscribe first")
        if len(self._subscriptions) >= SUBSCRIPTIONS:
            raise Problem(429, f"a socket has at most {SUBSCRIPTIONS} subscriptions", slug="too-many-subscriptions")
        made = Subscription(self._outbox, self._clock.monotonic, limits.credit, auto=limits.window is not None)
        self._subscriptions[session] = made
        return made

    async def _follow(self, id_: RequestId | None, options: ReadOptions, subscription: Subscription) -> None:
        reason = "disconnected"
        try:
            stream = await self._context.streams.open(self._principal, options)
            feed = stream.feed
            cursor = stream.cursor or options.cursor or feed.address.cursor(feed.last_seq).decode()
            await self._send(Subscribed(id=id_, session=options.session, cursor=cursor))
            reason = "complete"
            if stream.seq is not None:
                format_ = self._formats.of(options.session)
                reason = await self._context.streams.serve(stream, subscription.send, format_, subscription.joined)
        except asyncio.CancelledError:
            if not subscription.unsubscribed:
                raise
        except ConnectionError:
            return
        except Problem as problem:
            await self._send_if_open(Error(**_refusal(problem), id=id_, session=options.session))
            return
        except Exception:
            log.exception("subscription failed", session=options.session)
            reason = "failed"
        finally:
            del self._subscriptions[options.session]
        await self._part(options, reason, subscription)

    async def _part(self, options: ReadOptions, reason: str, subscription: Subscription) -> None:
        """Send the end of a subscription, or end the socket when the reason concerns all of it."""
        ended = "unsubscribed" if subscription.unsubscribed and reason == "disconnected" else _ENDS.get(reason)
        if ended is not None:
            await self._send_if_open(End(session=options.session, reason=ended, generation=options.generation))
        elif reason in ("drain", "evicted", "expired"):
            self.stop(reason)

    async def _send_if_open(self, message: msgspec.Struct) -> None:
        try:
            await self._send(message)
        except ConnectionError:
            return

    async def _operate(self, message: Any, operation: Any) -> None:
        """Run an operation on the broker as a task; wait while `OPERATIONS` are running, which stops the reader."""
        while len(self._operations) >= OPERATIONS:
            await asyncio.wait(self._operations, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(self._answered(message, operation))
        self._operations.add(task)
        task.add_done_callback(self._operations.discard)

    async def _answered(self, message: Any, operation: Any) -> None:
        answer: msgspec.Struct | None
        try:
            answer = await operation
        except Problem as problem:
            answer = _error(problem, message)
        except Exception:
            log.exception("request over a socket failed", request=type(message).__name__)
            answer = _error(Problem(500, "the error has been logged"), message)
        if answer is not None:
            await self._send_if_open(answer)

    async def _start(self, message: StartGeneration) -> msgspec.Struct | None:
        """Start a generation; return the answer, or ``None`` when it is sent already and a subscription follows."""
        session = message.session
        named("session", session)
        principal = authorize(self._principal, "start", session)
        key = message.idempotency_key
        if key is not None and not 0 < len(key) <= KEY_LIMIT:
            raise Problem(400, f"idempotency_key must have 1 to {KEY_LIMIT} characters")
        request = _generation_request(message.request)
        if message.subscribe is None:
            return _accepted(message, *await reach(self._context.intake.accept(principal, session, request, key)))
        # Check and reserve what the subscription needs before anything is queued.
        wanted, streams = message.subscribe, self._context.streams
        options = ReadOptions.read(session, from_="start", granularity=wanted.granularity, coalesce=wanted.coalesce)
        streams.check(principal, session)
        subscription = self._reserve(session, wanted)
        try:
            accept = reach(self._context.intake.accept(principal, session, request, key))
            found, _ = await together(accept, streams.prepare(principal.tenant, session))
            await self._send_if_open(_accepted(message, *found))
        except BaseException:
            del self._subscriptions[session]
            raise
        if subscription.unsubscribed or self._over.done():
            del self._subscriptions[session]
            return End(session=session, reason="unsubscribed", generation=found[0])
        options = options._replace(generation=found[0])
        subscription.task = asyncio.create_task(self._follow(message.id, options, subscription))
        return None

    async def _cancel(self, message: Cancel) -> msgspec.Struct:
        named("session", message.session)
        named("generation", message.generation)
        principal = authorize(self._principal, "cancel", message.session)
        state = await reach(self._context.intake.cancel(principal.tenant, message.session, message.generation))
        return Cancelling(id=message.id, session=message.session, generation=message.generation, state=state)


def _accepted(message: StartGeneration, generation: str, cursor: str, repeated: bool) -> Accepted:
    return Accepted(
        id=message.id,
        session=message.session,
        generation=generation,
        cursor=cursor,
        state="queued",
        repeated=repeated,
    )


def _cost(message: Any) -> float:
    """Return the cost of a message in tokens of the bucket."""
    if isinstance(message, Settle):
        return 1.0 + (len(message.acks) + len(message.nacks) + len(message.working)) / TOKENS_OF_A_MESSAGE
    return COSTLY if isinstance(message, _EXPENSIVE) else 1.0


def _error(problem: Problem, message: Any) -> Error:
    """Return the error message for a request."""
    about = {name: getattr(message, name, None) for name in ("id", "session", "consumer")}
    return Error(**_refusal(problem), **about)


def _refusal(problem: Problem) -> dict[str, Any]:
    retry = problem.headers.get("Retry-After", "")
    return {"problem": problem.details, "retry_after": int(retry) if retry.isdigit() else None}


def _size(data: str | bytes) -> int:
    return len(data) if isinstance(data, bytes) or data.isascii() else len(data.encode())


def _generation_request(request: Any) -> GenerationRequest:
    """Return the body of a request; by way of JSON, since MessagePack can hold what no provider can be sent.

    Raises:
        Problem: 400, the body is not valid.
    """
    try:
        return msgspec.json.decode(msgspec.json.encode(request), type=GenerationRequest)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
        raise Problem(400, f"request: {error}") from error
