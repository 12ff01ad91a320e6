"""Count the events sent to subscribers of each generation, and report them to billing periodically."""

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
"""Idle report rounds after which a counter is dropped; later events start a new counter."""
COUNTERS: Final = 50_000
"""Bound of counters in memory. Beyond it the longest idle are reported and dropped early."""

Publish = Callable[[str, bytes], Awaitable[object]]
"""Stores a message and returns once it is confirmed; raises `BrokerUnavailable` or `APIError` otherwise."""


class GenerationKey(NamedTuple):
    """Key of a generation."""

    tenant: str
    session: str
    generation: str


class _Counter:
    """Totals sent of one generation since the counter was created."""

    __slots__ = ("bytes", "events", "idle", "name", "number", "reported", "sent_tokens", "subscribers", "tokens")

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = 0
        self.idle = 0
        self.reported = True
        self.subscribers = self.events = self.tokens = self.sent_tokens = self.bytes = 0


class DeliveryReporter:
    """Collect counts and publish them. ``replica``: a name of this process, new at each start.

    `add` costs less than a microsecond and is meant to be called once per written chunk or stream.
    """

    def __init__(self, publish: Publish, replica: str, *, limit: int = COUNTERS) -> None:
        self._publish = publish
        self._replica = replica[:40]
        self._limit = limit
        self._serial = 0
        self._counters: OrderedDict[GenerationKey, _Counter] = OrderedDict()

    def add(
        self,
        key: GenerationKey,
        *,
        events: int,
        tokens: int = 0,
        reached: int = 0,
        size: int = 0,
        subscribers: int = 0,
    ) -> None:
        """Add sent events: ``tokens`` sent, and the generation's running token count ``reached``.

        ``size``: bytes as framed; ``subscribers``: number that receive this generation for the first time.
        """
        counter = self._counters.get(key)
        if counter is None:
            self._serial += 1
            counter = self._counters[key] = _Counter(f"{self._replica}-{self._serial}")
        elif counter.reported:
            self._counters.move_to_end(key)
        counter.reported = False
        counter.events += events
        counter.sent_tokens += tokens
        counter.bytes += size
        counter.subscribers += subscribers
        counter.tokens = max(counter.tokens, reached)

    def __len__(self) -> int:
        return len(self._counters)

    async def run(self, stop: asyncio.Event) -> None:
        """Report every `REPORT_SECONDS` until ``stop`` is set, and then once more."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_SECONDS):
                    await stop.wait()
            await self.report()
            if stop.is_set():
                return

    async def report(self) -> None:
        """Publish changed counts; without a broker keep them for the next round, within the bound."""
        try:
            for key, counter in list(self._counters.items()):
                if not counter.reported:
                    await self._notify(key, counter)
                elif counter.idle >= IDLE_ROUNDS or len(self._counters) > self._limit:
                    del self._counters[key]
                else:
                    counter.idle += 1
        except (BrokerUnavailable, APIError) as error:
            metrics.DELIVERED_REPORTS.labels("failed").inc()
            log.warning("what was delivered is not reported yet", waiting=len(self._counters), error=str(error))
            while len(self._counters) > self._limit:
                self._counters.popitem(last=False)
                metrics.DELIVERED_REPORTS.labels("lost").inc()

    async def _notify(self, key: GenerationKey, counter: _Counter) -> None:
        counter.number += 1
        counter.idle = 0
        counter.reported = True
        report = DeliveredReport(
            tenant=key.tenant,
            session=key.session,
            generation=key.generation,
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
            await self._publish(delivered_subject(*key), encode_delivered(report))
        except (BrokerUnavailable, APIError, asyncio.CancelledError):
            counter.reported = False
            raise
        except InvalidName as error:
            log.error("what was delivered cannot be reported", error=str(error))
        metrics.DELIVERED_REPORTS.labels("sent").inc()
