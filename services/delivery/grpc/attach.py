"""Serve `Attach`: several subscriptions over one call, each with credit or an automatic window."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError, Message

from schemas.cursor import Cursor, InvalidCursor
from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from services.delivery import metrics
from services.delivery.fanout.flow_control import FlowControl
from services.delivery.fanout.outbox import Outbox
from services.delivery.fanout.streams import ReadOptions, Streams
from services.delivery.fanout.subscriber import Subscriber
from services.delivery.formats.protobuf import PROTOBUF, Batch, item, item_read
from services.delivery.grpc.problems import as_message, as_problem
from services.kit.auth.principal import Principal
from services.kit.problem import Problem
from services.kit.tasks import together

__all__ = ["TOO_SLOW", "AttachCall", "Operation", "decoded", "read_options_of"]

SUBSCRIPTIONS: Final = 1_000
OPERATIONS: Final = 32  # starts and cancels under way
ID_LENGTH: Final = 64
LAST_WRITE_SECONDS: Final = 5.0
EXPIRED: Final = Problem(401, "the credentials are not valid any more")
TOO_SLOW: Final = Problem(503, "nothing was taken for too long: read again after the last cursor", slug="evicted")
_BEGIN: Final = {pb.BEGIN_UNSPECIFIED: None, pb.BEGIN_START: "start", pb.BEGIN_LIVE: "live"}

M = TypeVar("M", bound=Message)
Operation = Callable[[Principal, Any], Awaitable[Any]]


def decoded(message: type[M], data: bytes) -> M:
    """Parse a client's message.

    Raises:
        Problem: 400, the data is not a valid ``message``.
    """
    try:
        return message.FromString(data)
    except DecodeError as error:
        raise Problem(400, f"the request is no {message.DESCRIPTOR.full_name}: {error}") from error


def read_options_of(request: pb.ReadRequest) -> ReadOptions:
    """Return the read options of a request.

    Raises:
        Problem: 400, a field is not valid.
    """
    if request.begin not in _BEGIN:
        raise Problem(400, f"begin={request.begin} is not one of: BEGIN_UNSPECIFIED, BEGIN_START, BEGIN_LIVE")
    return ReadOptions.read(
        request.session,
        generation=request.generation or None,
        after=request.after or None,
        from_=_BEGIN[request.begin],
        granularity=request.granularity or None,
        coalesce=request.coalesce_ms or None,
    )


class _Subscription:
    """One subscription of a call, read with credit, with a window or without a limit.

    Raises:
        Problem: 400, both credit and a window.
    """

    def __init__(self, id_: str, request: pb.Subscribe, outbox: Outbox[bytes]) -> None:
        self.id = id_
        self._outbox = outbox
        credit, clock = request.credit, asyncio.get_running_loop().time
        self.flow = FlowControl(clock, credit.events, credit.bytes, auto=request.auto_window)
        self._subscriber: Subscriber | None = None
        self._unwanted: str | None = None

    def join(self, subscriber: Subscriber) -> None:
        self._subscriber = subscriber
        if self._unwanted is not None:
            subscriber.stop(self._unwanted)
        self.flow.join(subscriber)

    async def send(self, batch: Batch) -> None:
        if batch.events:
            self.flow.sent(_position(batch.cursor.decode()), batch.events, batch.size)
        await self._outbox.send((item_read(self.id, batch.data),))

    def end(self, reason: str) -> None:
        """End the subscription, now or as soon as its subscriber has joined the feed."""
        self._unwanted = reason
        if self._subscriber is not None:
            self._subscriber.stop(reason)


def _position(text: str) -> int:
    """Return the position of a cursor as a number that grows with the log."""
    try:
        cursor = Cursor.parse(text)
    except InvalidCursor as error:
        raise Problem(400, str(error), slug="cursor-invalid") from error
    return cursor.seq << 32 | cursor.offset


async def _awaiting(work: Awaitable[Any]) -> Any:
    return await work


class AttachCall:
    """Serve one call of `Attach`. ``operations``: functions that execute `start` and `cancel` for a principal.

    ``end``: latest end of the call in monotonic seconds, and its reason.
    """

    def __init__(
        self,
        streams: Streams,
        principal: Principal,
        outbox: Outbox[bytes],
        operations: dict[str, Operation],
        end: tuple[float, str],
    ) -> None:
        self.until, self.until_reason = end
        self._reason: str | None = None
        self._streams = streams
        self._principal = principal
        self._outbox = outbox
        self._operations = operations
        self._under_way = asyncio.Semaphore(OPERATIONS)
        self._subscriptions: dict[str, _Subscription] = {}  # bounded by SUBSCRIPTIONS
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader: asyncio.Task[None] | None = None

    async def run(self, requests: AsyncIterator[bytes]) -> None:
        """Serve requests until the client has closed its side and all subscriptions have ended.

        Raises:
            Problem: 503, the client did not read for too long; 401, its credentials have expired.
        """
        self._reader = asyncio.create_task(self._read(requests))
        try:
            await asyncio.wait({self._reader})
            # No more requests: wait for the subscriptions, whose ends are written before the call ends.
            while self._tasks and self._reason != "evicted":
                await asyncio.wait(self._tasks, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            if self._reason == "evicted" or not await self._outbox.flush(LAST_WRITE_SECONDS):
                raise TOO_SLOW
            if self._reason == "expired":
                raise EXPIRED
            if not self._reader.cancelled():
                self._reader.result()
        finally:
            left = [self._reader, *self._tasks]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def stop(self, reason: str) -> None:
        """Read no more requests and end all subscriptions; the call ends with them."""
        self._reason = "evicted" if reason == "evicted" else self._reason or reason
        if self._reader is not None:
            self._reader.cancel()
        for subscription in self._subscriptions.values():
            subscription.end(reason)

    @property
    def blocked_at(self) -> float | None:
        """Since when a write has waited for the client."""
        return self._outbox.blocked_at

    def poll(self, now: float) -> None:
        """Do nothing: the transport pings its clients."""

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        async for data in requests:
            id_ = ""
            try:
                request = decoded(pb.AttachRequest, data)
                id_ = request.id[:ID_LENGTH]
                await self._take(request)
            except Problem as problem:
                await self._outbox.send((item(id_, problem=as_message(problem)),))

    async def _take(self, request: pb.AttachRequest) -> None:
        if not 0 < len(request.id) <= ID_LENGTH:
            raise Problem(400, f"id must have 1 to {ID_LENGTH} characters")
        kind = request.WhichOneof("kind")
        metrics.GRPC_REQUESTS.labels(kind or "none").inc()
        match kind:
            case "subscribe":
                self._subscribe(request.id, request.subscribe)
            case "start" if request.start.HasField("follow"):
                subscription = self._reserve(request.id, request.start.follow)
                await self._under_way.acquire()
                self._spawn(self._start_and_serve(subscription, request.start))
            case "start" | "cancel":
                await self._under_way.acquire()
                self._spawn(self._operate(request.id, kind, getattr(request, kind)))
            case "credit":
                self._known(request.id).flow.grant(request.credit.events, request.credit.bytes)
            case "ack":
                self._known(request.id).flow.acked(_position(request.ack.cursor))
            case "unsubscribe":
                self._known(request.id).end("unsubscribed")
            case _:
                raise Problem(400, "kind must be one of: subscribe, credit, ack, unsubscribe, start, cancel")

    def _known(self, id_: str) -> _Subscription:
        """Return a subscription.

        Raises:
            Problem: 404, it does not exist; it may have ended just now.
        """
        found = self._subscriptions.get(id_)
        if found is None:
            raise Problem(404, f"there is no subscription {id_!r}")
        return found

    def _subscribe(self, id_: str, request: pb.Subscribe) -> None:
        self._spawn(self._serve(self._reserve(id_, request), request.read))

    def _reserve(self, id_: str, request: pb.Subscribe) -> _Subscription:
        """Return a new subscription, which the call counts from now on.

        Raises:
            Problem: 409, the id is in use; 429, the call has too many subscriptions; 400, wrong limits.
        """
        if id_ in self._subscriptions:
            raise Problem(409, f"the subscription {id_!r} has not ended: use another id")
        if len(self._subscriptions) >= SUBSCRIPTIONS:
            raise Problem(429, f"a call has at most {SUBSCRIPTIONS} subscriptions: open another one")
        subscription = _Subscription(id_, request, self._outbox)
        self._subscriptions[id_] = subscription
        return subscription

    async def _start_and_serve(self, subscription: _Subscription, request: pb.StartRequest) -> None:
        """Start a generation, answer with it, and serve it to the subscription."""
        id_, read, principal = subscription.id, pb.ReadRequest(), self._principal
        read.CopyFrom(request.follow.read)
        try:
            if read.session or read.generation or read.after or read.begin:
                raise Problem(400, "follow.read may have granularity and coalesce_ms: the start names the rest")
            read.session, read.begin = request.session, pb.BEGIN_START
            read_options_of(read)
            self._streams.check(principal, request.session)
            request.ClearField("follow")
            start = self._operations["start"](principal, request)
            response, _ = await together(_awaiting(start), self._streams.prepare(principal.tenant, request.session))
            await self._outbox.send((item(id_, start=response),))
        except Exception as error:
            del self._subscriptions[id_]
            await self._outbox.send((item(id_, problem=as_message(as_problem(error))),))
            return
        finally:
            self._under_way.release()
        read.generation = response.generation
        await self._serve(subscription, read)

    async def _serve(self, subscription: _Subscription, request: pb.ReadRequest) -> None:
        id_ = subscription.id
        try:
            stream = await self._streams.open(self._principal, read_options_of(request))
            reason = "complete"
            if stream.seq is not None:
                await self._outbox.send((item(id_, subscribed=pb.Subscribed(cursor=stream.cursor)),))
                reason = await self._streams.serve(stream, subscription.send, PROTOBUF, subscription.join)
            last = item(id_, ended=pb.Ended(reason=reason))
        except Exception as error:
            reason, last = "problem", item(id_, problem=as_message(as_problem(error)))
        finally:
            del self._subscriptions[id_]
        if reason == "evicted":
            self.stop(reason)
            return
        await self._outbox.send((last,))

    async def _operate(self, id_: str, kind: str, request: Any) -> None:
        try:
            answer = item(id_, **{kind: await self._operations[kind](self._principal, request)})
        except Exception as error:
            answer = item(id_, problem=as_message(as_problem(error)))
        finally:
            self._under_way.release()
        await self._outbox.send((answer,))

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieve the error of a call that has ended: no client can receive it
