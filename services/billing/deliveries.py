"""Takes delivery's reports of what subscribers were sent."""

import asyncio
from contextlib import suppress
from typing import Final

import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from schemas.delivered import DeliveredReport, decode_delivered
from schemas.topology import DELIVERED, DELIVERED_DURABLE, ConsumerSpec
from services.billing import metrics
from services.billing.adapters.deliveries import Deliveries
from services.billing.errors import LedgerUnavailable
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.consumer import DurableRefused, Durables

__all__ = ["DeliveryReports"]

log = structlog.get_logger()
BATCH: Final = 1_000
LOOK_SECONDS: Final = 5.0
"""How often the consumer's position is compared with its stream."""
WAIT_SECONDS: Final = 1.0
_PAUSE: Final = 1.0


class DeliveryReports:
    """Fetches reports, writes them, acknowledges them. Any number of processes may do so at once.

    A report is written before it is acknowledged, and the newest one of a counter holds: repeats change nothing.
    """

    def __init__(self, broker: Broker, deliveries: Deliveries, spec: ConsumerSpec) -> None:
        self._broker = broker
        self._spec = spec
        self._deliveries = deliveries
        self._stop = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Take reports until ``stop`` is set."""
        self._stop = stop
        while not stop.is_set():
            try:
                await self._follow()
            except (BrokerUnavailable, DurableRefused, LedgerUnavailable, nats.errors.Error, OSError) as error:
                log.warning("reports of deliveries wait", error=repr(error))
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PAUSE):
                        await stop.wait()

    async def _follow(self) -> None:
        durables, looked_at = Durables(self._broker), -LOOK_SECONDS
        subscription = await self._broker.js.pull_subscribe_bind(DELIVERED_DURABLE, DELIVERED)
        try:
            while not self._stop.is_set():
                now = asyncio.get_running_loop().time()
                if now - looked_at >= LOOK_SECONDS:
                    looked_at = now
                    await durables.mend(self._spec)
                messages = await self._fetch(subscription)
                await self._deliveries.put(_reports(messages))
                # Also those whose generation billing had not seen when they came.
                await self._deliveries.place()
                for message in messages:
                    await message.ack()
        finally:
            with suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    async def _fetch(self, subscription: JetStreamContext.PullSubscription) -> list[Msg]:
        try:
            return await subscription.fetch(BATCH, timeout=WAIT_SECONDS)
        except TimeoutError:
            return []


def _reports(messages: list[Msg]) -> list[DeliveredReport]:
    found: list[DeliveredReport] = []
    for message in messages:
        try:
            found.append(decode_delivered(message.data))
        except ValueError as error:
            metrics.DELIVERY_REPORTS.labels("malformed").inc()
            log.warning("a report of deliveries cannot be read", subject=message.subject, error=str(error))
    metrics.DELIVERY_REPORTS.labels("taken").inc(len(found))
    return found
