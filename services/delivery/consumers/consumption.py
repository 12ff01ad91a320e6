"""Read a durable consumer over a WebSocket or gRPC call, within the credit of its client."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Final

import structlog

from services.delivery.consumers.access import open_session
from services.delivery.consumers.pulling import PIECE_BYTES, SLICE, STREAM_BATCH, pulled
from services.delivery.consumers.registry import Consumers
from services.delivery.consumers.session import ConsumerSession, Delivery
from services.delivery.fanout.flow_control import CreditCount
from services.kit.auth.principal import Principal
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem

__all__ = ["LOST", "Consumption", "Give"]

log = structlog.get_logger()
LOST: Final = frozenset({"disconnected", "evicted", "silent"})
"""Reasons of an end after which recently written events cannot be assumed to be received."""
HELD: Final = 10_000
"""Most remembered tokens: the highest ``max_in_flight`` of a consumer."""
PATIENCE: Final = 5.0
"""Seconds without credit after which buffered events return to the broker, for other readers."""

Give = Callable[[Sequence[Delivery]], Awaitable[None]]
"""Writes events to the connection; returns after the write. Raises `ConnectionError` when it is closed."""


class Consumption:
    """Read one consumer for one connection until `stop`.

    ``credit``: initial number of events that may be sent; `settled` returns the credit of explicitly acknowledged
    events, `grant` adds credit. ``None``: no limit but the connection's. ``auto``: acknowledge events when they are
    written.
    """

    def __init__(self, consumers: Consumers, name: str, *, auto: bool, credit: int | None) -> None:
        self.name = name
        self._consumers = consumers
        self._auto = auto
        self._credit = CreditCount(credit)
        self._held: dict[str, bool] = {}  # tokens of what takes up credit; bounded by HELD
        self._over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def stop(self, reason: str) -> None:
        """End the reading; the first reason wins."""
        if not self._over.done():
            self._over.set_result(reason)
        self._credit.close()

    def grant(self, events: int) -> None:
        """Add credit for ``events`` more events.

        Raises:
            Problem: 409, the consumer is read without credit.
        """
        self._credit.grant(events)

    def settled(self, tokens: Iterable[str]) -> None:
        """Give back the credit of events that are settled; tokens that were not given here do nothing."""
        if freed := sum(self._held.pop(token, False) for token in tokens):
            self._credit.grant(freed)

    async def run(self, principal: Principal, opened: Callable[[], Awaitable[None]], give: Give) -> str:
        """Read to the end; return the reason. ``opened`` is called when reading begins.

        Reasons in addition to those of `stop`: ``deleted``, and ``unavailable`` without a broker.

        Raises:
            Problem: the principal has no such consumer, or cannot read it now.
            ConnectionError: the connection is closed.
        """
        session = await open_session(self._consumers, principal, self.name)
        try:
            await opened()
            while True:
                # Read; without credit for a while, close the session, which returns its buffered events.
                reason = await self._follow(session, give)
                await session.close()
                if reason is not None or not await self._credit.wait(None):
                    return reason or self._over.result()
                try:
                    session = await open_session(self._consumers, principal, self.name)
                except Problem as problem:
                    return "deleted" if problem.status == 404 else "unavailable"
        except BrokerUnavailable as error:
            log.warning("consumer no longer read: the log cannot be read", consumer=self.name, detail=str(error))
            return "unavailable"
        finally:
            await session.close()

    async def _follow(self, session: ConsumerSession, give: Give) -> str | None:
        """Send events; return the reason of the end, or None after `PATIENCE` without credit."""
        patience = min(PATIENCE, session.opened.definition.spec.ack_wait / 2)
        while not self._over.done():
            if session.is_gone:
                return "deleted"
            if self._credit.room == 0 and not await self._credit.wait(patience):
                return self._over.result() if self._over.done() else None
            room = self._credit.room
            limit = STREAM_BATCH if room is None else min(STREAM_BATCH, room)
            given = await pulled(session, limit, SLICE, self._over)
            await self._pass_on(session, given, give)
        return self._over.result()

    async def _pass_on(self, session: ConsumerSession, given: list[Delivery], give: Give) -> None:
        """Send events in chunks, acknowledge the written ones if ``auto``, and nack the others."""
        written = 0
        try:
            for piece in _pieces(given):
                if self._over.done():
                    return
                self._hold(piece)
                await give(piece)
                if self._over.done() and self._over.result() in LOST:
                    return
                written += len(piece)
                if self._auto:
                    await session.ack(list(piece))
        finally:
            with suppress(BrokerUnavailable):
                await session.nack(given[written:])

    def _hold(self, piece: Sequence[Delivery]) -> None:
        self._credit.take(len(piece))
        if self._auto or self._credit.room is None:
            return
        self._held |= dict.fromkeys((delivery.token for delivery in piece), True)
        while len(self._held) > HELD:
            del self._held[next(iter(self._held))]


def _pieces(given: Sequence[Delivery]) -> Iterator[Sequence[Delivery]]:
    """Split events into chunks of about `PIECE_BYTES`, with at least one event each."""
    start, size = 0, 0
    for stop, delivery in enumerate(given, 1):
        size += len(delivery.data)
        if size >= PIECE_BYTES or stop == len(given):
            yield given[start:stop]
            start, size = stop, 0
