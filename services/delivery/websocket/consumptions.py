"""Read durable consumers over one WebSocket and settle their events."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import structlog

from services.delivery.consumers.access import permitted
from services.delivery.consumers.consumption import LOST, Consumption
from services.delivery.consumers.pulling import about, envelope
from services.delivery.consumers.registry import Consumers
from services.delivery.consumers.session import Delivery
from services.delivery.consumers.settling import Settlement, settle
from services.delivery.consumers.tokens import InvalidToken
from services.delivery.errors import reach
from services.delivery.fanout.outbox import Outbox
from services.delivery.formats.websocket import frame_message, packed
from services.delivery.formats.websocket_messages import (
    Consume,
    Consuming,
    Credit,
    Deliveries,
    Dialect,
    Error,
    Settle,
    Settled,
    Stopped,
    Unconsume,
)
from services.kit.auth.principal import Principal
from services.kit.problem import Problem

__all__ = ["Consumptions"]

log = structlog.get_logger()
CONSUMPTIONS: Final = 8
Refuse = Callable[[Problem, Consume], Error]


class Consumptions:
    """Manage at most `CONSUMPTIONS` consumers that a socket reads. ``refuse``: makes the error of a problem."""

    def __init__(
        self,
        consumers: Consumers,
        principal: Principal,
        dialect: Dialect,
        outbox: Outbox[dict[str, Any]],
        refuse: Refuse,
    ) -> None:
        self._consumers = consumers
        self._principal = principal
        self._dialect = dialect
        self._outbox = outbox
        self._refuse = refuse
        self._open: dict[str, Consumption] = {}  # bounded by CONSUMPTIONS
        self.tasks: set[asyncio.Task[None]] = set()  # one for each consumer that is open or ending

    def __contains__(self, name: object) -> bool:
        return name in self._open

    def stop(self, reason: str) -> None:
        """End the reading of all consumers."""
        for consumption in self._open.values():
            consumption.stop(reason)

    def consume(self, message: Consume) -> None:
        """Begin to read a consumer.

        Raises:
            Problem: 409, the socket reads it already; 429, the socket reads `CONSUMPTIONS` consumers.
        """
        if message.consumer in self._open:
            raise Problem(409, f"this socket reads consumer {message.consumer!r} already: unconsume first")
        if len(self._open) >= CONSUMPTIONS:
            raise Problem(429, f"a socket reads at most {CONSUMPTIONS} consumers", slug="too-many-consumers")
        credit = None if message.credit is None else message.credit.events
        consumption = Consumption(self._consumers, message.consumer, auto=message.ack == "auto", credit=credit)
        self._open[message.consumer] = consumption
        task = asyncio.create_task(self._follow(message, consumption))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def grant(self, message: Credit) -> None:
        """Add credit to a consumer.

        Raises:
            Problem: 400, ``events`` is missing or another field is set; 404, the socket does not read the consumer;
                409, it is read without credit.
        """
        if message.session is not None or message.bytes is not None or message.events is None:
            raise Problem(400, "credit for a consumer has `events`, and neither `bytes` nor `session`")
        self._reading(message.consumer).grant(message.events)

    def unconsume(self, message: Unconsume) -> None:
        """Stop reading a consumer.

        Raises:
            Problem: 404, the socket does not read the consumer.
        """
        self._reading(message.consumer).stop("unconsumed")

    async def settle(self, message: Settle) -> Settled:
        """Settle events, including events of other connections.

        Raises:
            Problem: the principal has no such consumer; 400, a token is not valid; 503, the broker is not connected.
        """
        await permitted(self._consumers, self._principal, message.consumer, recent=True)
        words = Settlement(acks=message.acks, nacks=message.nacks, working=message.working, delay=message.delay)
        try:
            found = await reach(settle(self._consumers, self._principal.tenant, message.consumer, words))
        except InvalidToken as error:
            raise Problem(400, str(error), slug="token-invalid", title="The token is not valid here") from error
        if (consumption := self._open.get(message.consumer)) is not None:
            consumption.settled([*message.acks, *message.nacks])
        return Settled(id=message.id, consumer=message.consumer, settled=found.settled, unknown=found.unknown)

    def _reading(self, name: str | None) -> Consumption:
        found = self._open.get(name or "")
        if found is None:
            raise Problem(404, f"this socket does not read consumer {str(name)[:80]!r}")
        return found

    async def _follow(self, message: Consume, consumption: Consumption) -> None:
        name, auto = message.consumer, message.ack == "auto"

        async def opened() -> None:
            await self._send(Consuming(id=message.id, consumer=name))

        async def give(events: Sequence[Delivery]) -> None:
            frames = [msgspec.Raw(self._frame(event, auto=auto)) for event in events]
            await self._outbox.write([self._message(Deliveries(consumer=name, events=frames))])

        last: msgspec.Struct | None = None
        try:
            reason = await consumption.run(self._principal, opened, give)
            last = None if reason in LOST else Stopped(consumer=name, reason=reason)
        except ConnectionError:
            return
        except Problem as problem:
            last = self._refuse(problem, message)
        except Exception:
            log.exception("consumer no longer read", consumer=name)
            last = Stopped(consumer=name, reason="failed")
        finally:
            del self._open[name]
        if last is not None:
            await self._send(last)

    def _frame(self, delivery: Delivery, *, auto: bool) -> bytes:
        if self._dialect.text:
            return envelope(delivery, auto=auto)
        return packed(about(delivery, auto=auto), delivery.data)

    def _message(self, message: msgspec.Struct) -> dict[str, Any]:
        return frame_message(self._dialect.encode(message), self._dialect.text)

    async def _send(self, message: msgspec.Struct) -> None:
        try:
            await self._outbox.send([self._message(message)])
        except ConnectionError:
            return
