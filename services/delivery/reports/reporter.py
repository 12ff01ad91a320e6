"""Counts what subscribers are sent of each generation, and reports it to billing now and then."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, NamedTuple

import structlog

from schemas.delivered import DeliveredReport, delivered_subject, encode_delivered
from schemas.names import InvalidName
from services.delivery import metrics
from services.kit.jetstream.errors import APIError, BrokerUnavailable

__all__ = ["DeliveryReporter", "GenerationKey"]

log = structlog.get_logger()
REPORT_SECONDS: Final = 5.0
IDLE_ROUNDS: Final = 12
"""Reports without news after which a counter is forgotten; what is sent later is counted by another one."""
COUNTERS: Final = 50_000
"""Bound of counters in memory. Beyond it those longest without news are reported and forgotten early."""

Publish = Callable[[str, bytes], Awaitable[object]]
"""Stores a message and returns once that is sure; raises `BrokerUnavailable` or `APIError` otherwise."""


class GenerationKey(NamedTuple):
    """A generation."""

    tenant: str
    session: str
    generation: str


class _Counter:
    """What was sent of one generation since it began to count."""

    __slots__ = ("bytes", "events", "idle", "name", "number", "reported", "sent_tokens", "subscribers", "tokens")

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = 0
        self.idle = 0
        self.reported = True
        self.subscribers = self.events = self.tokens = self.sent_tokens = self.bytes = 0


class DeliveryReporter:
    """Collects counts and publishes them. ``replica`` names this process, another one each time that it starts.

    `add` costs less than a microsecond and is meant to be called once a written chunk, or once a stream.
    """

    def __init__(self, publish: Publish, replica: str, *, limit: int = COUNTERS) -> None:
        self._publish = publish
        self._replica = replica[:40]
        self._limit = limit
        self._serial = 0
        self._counters: OrderedDict[GenerationKey, _Counter] = OrderedDict()

    def add(
        self,
        place: GenerationKey,
        *,
        events: int,
        tokens: int = 0,
        reached: int = 0,
        size: int = 0,
        subscribers: int = 0,
    ) -> None:
        """Count what was sent: ``tokens`` to this subscriber, whose running count has thereby ``reached`` so many.

        ``size`` in bytes as framed; ``subscribers``: how many get something of this generation for the first time.
        """
        counter = self._counters.get(place)
        if counter is None:
            self._serial += 1
            counter = self._counters[place] = _Counter(f"{self._replica}-{self._serial}")
        elif counter.reported:
            self._counters.move_to_end(place)
        counter.reported = False
        counter.events += events
        counter.sent_tokens += tokens
        counter.bytes += size
        counter.subscribers += subscribers
        counter.tokens = max(counter.tokens, reached)

    def __len__(self) -> int:
        return len(self._counters)

    async def run(self, stop: asyncio.Event) -> None:
        """Report every few seconds until ``stop`` is set, and then once more."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_SECONDS):
                    await stop.wait()
            await self.report()
            if stop.is_set():
                return

    async def report(self) -> None:
        """Publish what is new; without a broker it waits for the next time, as far as the bound allows."""
        try:
            for place, counter in list(self._counters.items()):
                if not counter.reported:
                    await self._tell(place, counter)
                elif counter.idle >= IDLE_ROUNDS or len(self._counters) > self._limit:
                    del self._counters[place]
                else:
                    counter.idle += 1
        except (BrokerUnavailable, APIError) as error:
            metrics.DELIVERED_REPORTS.labels("failed").inc()
            log.warning("what was delivered is not reported yet", waiting=len(self._counters), error=str(error))
            while len(self._counters) > self._limit:
                self._counters.popitem(last=False)
                metrics.DELIVERED_REPORTS.labels("lost").inc()

    async def _tell(self, place: GenerationKey, counter: _Counter) -> None:
        counter.number += 1
        counter.idle = 0
        counter.reported = True
        report = DeliveredReport(
            tenant=place.tenant,
            session=place.session,
            generation=place.generation,
            counter=counter.name,
            number=counter.number,
            subscribers=counter.subscribers,
            events=counter.events,
            tokens=counter.tokens,
            sent_tokens=counter.sent_tokens,
            bytes=counter.bytes,
            at=round(time.time(), 3),
        )
        try:
            await self._publish(delivered_subject(*place), encode_delivered(report))
        except (BrokerUnavailable, APIError, asyncio.CancelledError):
            counter.reported = False
            raise
        except InvalidName as error:
            log.error("what was delivered cannot be reported", error=str(error))
        metrics.DELIVERED_REPORTS.labels("sent").inc()
