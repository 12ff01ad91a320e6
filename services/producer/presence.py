"""Who listens to a generation: asked of the delivery replicas, which hold a subscription as long as somebody does."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from schemas.requests import CancelAfter
from schemas.subjects import presence_subject
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.producer.relay import Interruption, Relay

__all__ = ["Presence"]

log = structlog.get_logger()
ASK_INTERVAL: Final = 0.5
ANSWER_SECONDS: Final = 1.0
SETTLE_SECONDS: Final = 5.0


class Presence:
    """Cancels generations to which nobody has listened for the time that their request allows."""

    def __init__(self, broker: Broker, clock: Clock, running: Callable[[], Iterable[Relay]]) -> None:
        self._broker = broker
        self._clock = clock
        self._running = running
        self._absent: dict[str, float] = {}  # since when nobody listens; bounded by what runs
        self._settled_at = 0.0
        broker.on_reconnect(self._reconnected)

    async def _reconnected(self) -> None:
        """Begin anew: delivery replicas lost their connections too, and are back only a little later."""
        self._absent.clear()
        self._settled_at = self._clock.monotonic() + SETTLE_SECONDS

    async def watch(self) -> None:
        """Ask twice a second for every generation that may be cancelled so; runs until cancelled."""
        while True:
            await asyncio.sleep(ASK_INTERVAL)
            relays = [r for r in self._running() if isinstance(r.request.on_disconnect, CancelAfter)]
            names = {relay.request.generation for relay in relays}
            self._absent = {name: since for name, since in self._absent.items() if name in names}
            await asyncio.gather(*(self._look(relay) for relay in relays))

    async def _look(self, relay: Relay) -> None:
        request = relay.request
        assert isinstance(request.on_disconnect, CancelAfter)
        now = self._clock.monotonic()
        try:
            subject = presence_subject(request.tenant, request.session, request.generation)
            answer = await self._broker.request(subject, timeout=ANSWER_SECONDS)
        except BrokerUnavailable:
            self._absent.pop(request.generation, None)  # somebody may listen: nothing is known, so nothing is done
            return
        if answer is not None or now < self._settled_at:
            self._absent.pop(request.generation, None)
            return
        since = self._absent.setdefault(request.generation, now)
        if now - since >= request.on_disconnect.cancel_after:
            log.info("nobody listens", session=request.session, generation=request.generation)
            relay.interrupt(Interruption("cancelled", "disconnected"))
