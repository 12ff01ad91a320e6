"""Cancel generations without subscribers (``on_disconnect: cancel_after``).

Delivery replicas subscribe to the presence subject of each generation that they have subscribers of: a request without
responders means that there are none.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from schemas.requests import CancelAfter
from schemas.subjects import presence_subject
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.producer.relay import Relay

__all__ = ["Presence"]

log = structlog.get_logger()
ASK_INTERVAL: Final = 0.5
ANSWER_SECONDS: Final = 1.0
SETTLE_SECONDS: Final = 5.0


class Presence:
    """Cancel generations that had no subscriber for as long as their request allows."""

    def __init__(self, broker: Broker, clock: Clock, running: Callable[[], Iterable[Relay]]) -> None:
        self._broker = broker
        self._clock = clock
        self._running = running
        self._absent: dict[str, float] = {}  # when each was first seen without subscribers; bounded by what runs
        self._settled_at = 0.0
        broker.on_reconnect(self._reconnected)

    async def _reconnected(self) -> None:
        """Forget absences: delivery replicas lost their connections too, and may reconnect a little later."""
        self._absent.clear()
        self._settled_at = self._clock.monotonic() + SETTLE_SECONDS

    async def watch(self) -> None:
        """Check each generation that may be cancelled, twice a second, until cancelled."""
        while True:
            await asyncio.sleep(ASK_INTERVAL)
            relays = [r for r in self._running() if isinstance(r.request.on_disconnect, CancelAfter)]
            names = {relay.request.generation for relay in relays}
            self._absent = {name: since for name, since in self._absent.items() if name in names}
            await asyncio.gather(*(self._check(relay) for relay in relays))

    async def _check(self, relay: Relay) -> None:
        request = relay.request
        assert isinstance(request.on_disconnect, CancelAfter)
        now = self._clock.monotonic()
        try:
            subject = presence_subject(request.tenant, request.session, request.generation)
            answer = await self._broker.request(subject, timeout=ANSWER_SECONDS)
        except BrokerUnavailable:
            self._absent.pop(request.generation, None)  # unknown: do not cancel
            return
        if answer is not None or now < self._settled_at:
            self._absent.pop(request.generation, None)
            return
        since = self._absent.setdefault(request.generation, now)
        if now - since >= request.on_disconnect.cancel_after:
            log.info("generation has no subscribers", session=request.session, generation=request.generation)
            relay.interruption.interrupt("cancelled", "disconnected")
