"""Consume delivery's reports of the events sent to subscribers."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import structlog

from schemas.delivered import DeliveredReport, decode_delivered
from schemas.topology import ConsumerSpec
from services.billing import metrics
from services.billing.adapters.deliveries import Deliveries
from services.billing.errors import LedgerUnavailable
from services.kit.jetstream.ack import ACK
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.consumer import Durables
from services.kit.jetstream.errors import APIError
from services.kit.jetstream.pull import Arrived, End, PullConsumer

__all__ = ["DeliveryReports"]

log = structlog.get_logger()
BATCH: Final = 1_000
COMPARE_SECONDS: Final = 5.0
"""Seconds between comparisons of the consumer's position with its stream."""
WAIT_SECONDS: Final = 1.0
"""Seconds that a pull waits for reports: those that arrive within it are written together."""
_PAUSE: Final = 1.0


class DeliveryReports:
    """Pull reports, write them, and acknowledge them. Any number of processes may do so at once.

    A report is written before it is acknowledged, and the newest one of a counter wins: repeats change nothing.
    """

    def __init__(self, broker: Broker, deliveries: Deliveries, spec: ConsumerSpec) -> None:
        self._broker = broker
        self._spec = spec
        self._deliveries = deliveries
        self._stop = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Consume reports until ``stop`` is set."""
        self._stop = stop
        while not stop.is_set():
            try:
                await self._follow()
            except (BrokerUnavailable, APIError, LedgerUnavailable) as error:
                log.warning("reports of deliveries wait", error=repr(error))
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PAUSE):
                        await stop.wait()

    async def _follow(self) -> None:
        durables, compared_at = Durables(self._broker), -COMPARE_SECONDS
        consumer = PullConsumer(self._broker, self._spec.stream, self._spec.durable)
        try:
            while not self._stop.is_set():
                now = asyncio.get_running_loop().time()
                if now - compared_at >= COMPARE_SECONDS:
                    compared_at = now
                    await durables.mend(self._spec)
                messages = await consumer.fetch(BATCH, wait=WAIT_SECONDS)
                await self._deliveries.put(_reports(messages))
                # Also reports whose generation was unknown to billing when they arrived.
                await self._deliveries.update_generations()
                for _, reply, _ in messages:
                    await self._broker.publish(reply.decode(), ACK)
                if consumer.end in (End.GONE, End.REFUSED):
                    raise BrokerUnavailable(f"no delivery reports arrive: {consumer.reason}")
        finally:
            await consumer.close(0.0)


def _reports(messages: Iterable[Arrived]) -> list[DeliveredReport]:
    found: list[DeliveredReport] = []
    for subject, _, data in messages:
        try:
            found.append(decode_delivered(data))
        except ValueError as error:
            metrics.DELIVERY_REPORTS.labels("malformed").inc()
            log.warning("delivery report not readable", subject=subject.decode(), error=str(error))
    metrics.DELIVERY_REPORTS.labels("taken").inc(len(found))
    return found
