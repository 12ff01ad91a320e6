"""Serve `Consume`: read a durable consumer and settle its events over one call."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from services.delivery import metrics
from services.delivery.consumers.access import permitted
from services.delivery.consumers.consumption import Consumption
from services.delivery.consumers.registry import Consumers
from services.delivery.consumers.session import Delivery
from services.delivery.consumers.settling import Settlement, settle
from services.delivery.consumers.tokens import InvalidToken
from services.delivery.errors import reach
from services.delivery.fanout.outbox import Outbox
from services.delivery.formats.protobuf import typed
from services.delivery.grpc.attach import EXPIRED, ID_LENGTH, LAST_WRITE_SECONDS, TOO_SLOW, decoded
from services.delivery.grpc.problems import as_message, as_problem
from services.kit.auth.principal import Principal
from services.kit.problem import Problem

__all__ = ["ConsumeCall"]

FIRST_SECONDS: Final = 30.0
"""Longest wait in seconds for the first request of a call."""


class ConsumeCall:
    """Serve one call of `Consume`; ``end``: when it ends at the latest, in monotonic seconds, and why.

    Requests are handled one after another, so the flow control of HTTP/2 bounds what a client sends.
    """

    def __init__(
        self,
        consumers: Consumers,
        principal: Principal,
        outbox: Outbox[bytes],
        end: tuple[float, str],
    ) -> None:
        self._consumers = consumers
        self._principal = principal
        self._outbox = outbox
        self.until, self.until_reason = end
        self._reason: str | None = None
        self._consumption: Consumption | None = None
        self._first: asyncio.Task[pb.OpenConsumer] | None = None
        self._task: asyncio.Task[str] | None = None

    async def run(self, requests: AsyncIterator[bytes]) -> None:
        """Read the consumer until the client stops it or `stop` is called.

        Raises:
            Problem: the principal has no such consumer; 503, the client did not read for too long; 401, its
                credentials have expired.
        """
        opening = await self._opening(requests)
        self._consumption = Consumption(
            self._consumers, opening.consumer, auto=opening.auto_ack, credit=opening.window or None
        )
        give = self._giving(auto=opening.auto_ack)
        self._task = asyncio.create_task(self._consumption.run(self._principal, self._opened, give))
        reader = asyncio.create_task(self._read(requests, opening.consumer))
        try:
            await asyncio.wait({self._task})
            if self._task.cancelled():
                raise TOO_SLOW
            await self._end(self._task.result())
        except ConnectionError:
            return
        finally:
            for task in (self._task, reader):
                task.cancel()
            await asyncio.gather(self._task, reader, return_exceptions=True)

    def stop(self, reason: str) -> None:
        """End the call; the first reason wins. ``evicted`` cancels the pending write."""
        self._reason = self._reason or reason
        if self._consumption is not None:
            self._consumption.stop(self._reason)
        elif self._first is not None:
            self._first.cancel()
        if reason == "evicted" and self._task is not None:
            self._task.cancel()

    @property
    def blocked_at(self) -> float | None:
        """Start of the write that is under way, in monotonic seconds."""
        return self._outbox.blocked_at

    def poll(self, now: float) -> None:
        """Do nothing: the transport pings its clients."""

    async def _opening(self, requests: AsyncIterator[bytes]) -> pb.OpenConsumer:
        """Return the first request; `stop` ends the wait.

        Raises:
            Problem: 400, the first request is not ``open``; 401 or 503 after `stop`.
        """
        self._first = asyncio.create_task(_first(requests))
        try:
            await asyncio.wait({self._first})
            if not self._first.cancelled():
                return self._first.result()
        finally:
            self._first.cancel()
        if self._reason == "expired":
            raise EXPIRED
        raise Problem(503, "this replica is going away", headers={"Retry-After": "1"})

    async def _end(self, reason: str) -> None:
        if reason == "evicted":
            raise TOO_SLOW
        if reason == "disconnected":
            return
        try:
            async with asyncio.timeout(LAST_WRITE_SECONDS):
                await self._send(stopped=pb.Stopped(reason=reason))
        except TimeoutError as error:
            raise TOO_SLOW from error
        if reason == "expired":
            raise EXPIRED

    async def _read(self, requests: AsyncIterator[bytes], name: str) -> None:
        """Handle the requests after the first one."""
        async for data in requests:
            id_ = ""
            try:
                request = decoded(pb.ConsumeRequest, data)
                id_ = request.settle.id[:ID_LENGTH]
                await self._take(request, name)
            except ConnectionError:
                return
            except Exception as error:
                await self._send(refused=pb.Refused(id=id_, problem=as_message(as_problem(error))))

    async def _take(self, request: pb.ConsumeRequest, name: str) -> None:
        kind = request.WhichOneof("kind")
        metrics.GRPC_REQUESTS.labels(kind or "none").inc()
        assert self._consumption is not None
        match kind:
            case "settle":
                await self._settle(request.settle, name, self._consumption)
            case "credit" if request.credit.events:
                self._consumption.grant(request.credit.events)
            case "credit":
                raise Problem(400, "credit needs `events`, of 1 or more")
            case "stop":
                self._consumption.stop("unconsumed")
            case "open":
                raise Problem(409, "this call reads a consumer already: open another call")
            case _:
                raise Problem(400, "kind must be one of: settle, credit, stop")

    async def _settle(self, words: pb.Settle, name: str, consumption: Consumption) -> None:
        if len(words.id) > ID_LENGTH:
            raise Problem(400, f"id must have at most {ID_LENGTH} characters")
        fields = {"acks": [*words.acks], "nacks": [*words.nacks], "working": [*words.working], "delay": words.delay}
        try:
            settlement = msgspec.convert(fields, Settlement)
            await permitted(self._consumers, self._principal, name, recent=True)
            found = await reach(settle(self._consumers, self._principal.tenant, name, settlement))
        except msgspec.ValidationError as error:
            raise Problem(400, str(error)) from error
        except InvalidToken as error:
            raise Problem(400, str(error), slug="token-invalid", title="The token is not valid here") from error
        consumption.settled([*words.acks, *words.nacks])
        await self._send(settled=pb.Settled(id=words.id, settled=found.settled, unknown=found.unknown))

    async def _opened(self) -> None:
        await self._send(consuming=pb.Consuming())

    def _giving(self, *, auto: bool) -> Callable[[Sequence[Delivery]], Awaitable[None]]:
        async def give(events: Sequence[Delivery]) -> None:
            await self._send(deliveries=pb.Deliveries(events=[_event(event, auto=auto) for event in events]))

        return give

    async def _send(self, **kind: Any) -> None:
        """Write one response.

        Raises:
            ConnectionError: the call has ended.
        """
        await self._outbox.write((pb.ConsumeResponse(**kind).SerializeToString(),))


async def _first(requests: AsyncIterator[bytes]) -> pb.OpenConsumer:
    with suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(FIRST_SECONDS):
            request = decoded(pb.ConsumeRequest, await anext(requests))
            if request.WhichOneof("kind") == "open":
                return request.open
    raise Problem(400, "the first request must be `open`, with the name of a consumer")


def _event(delivery: Delivery, *, auto: bool) -> pb.ConsumerEvent:
    event = typed(delivery.data)
    event.cursor = delivery.cursor
    return pb.ConsumerEvent(
        token="" if auto else delivery.token,
        session=delivery.session,
        deliveries=delivery.deliveries,
        gap=delivery.gap or "",
        event=event,
    )
