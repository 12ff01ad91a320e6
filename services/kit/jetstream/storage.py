"""Whether the broker stores what it is sent: a full disk shows in nothing but acknowledgements that do not come."""

import asyncio
import secrets
from collections.abc import Callable
from typing import Final

import structlog
from prometheus_client import Gauge

from schemas.storage import REFUSED_SUBJECT, probe_subjects
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.connection import Message
from services.kit.jetstream.errors import APIError

__all__ = ["Storage"]

log = structlog.get_logger()
STORES: Final = Gauge("tailrace_log_writable", "Whether the broker stores what it is sent (1) or not (0)")
PROBE_SECONDS: Final = 5.0
PROBE_TIMEOUT: Final = 3.0
DOUBT_SECONDS: Final = 15.0
"""How long a write that was not acknowledged counts against the broker, unless another one is acknowledged."""
HEARD_SECONDS: Final = 12.0
"""How long it counts what another service has said: each repeats it while it holds."""


def _never() -> bool:
    return False


class Storage:
    """Writes a few bytes now and then, heeds what becomes of the service's other writes, and hears of the others'.

    nats-server keeps refusing a stream that it could not store into once, also when there is space again, until it is
    started anew; another stream may have had room in its last file. So every service knows only a part. ``is_stuck``:
    what the service knows besides.
    """

    def __init__(self, broker: Broker, service: str, is_stuck: Callable[[], bool] = _never) -> None:
        self._broker = broker
        self._subjects = probe_subjects(service)
        self._is_stuck = is_stuck
        self._name = secrets.token_bytes(8)
        self._refused: set[str] = set()  # of the subjects
        self._heard_at: float | None = None
        self._probed_at = 0.0
        self._listens = False
        STORES.set(1)

    def stores(self) -> bool:
        """Tell whether the broker stores what it is sent, as far as that is known."""
        now = asyncio.get_running_loop().time()
        return not self._has_seen(now) and (self._heard_at is None or now - self._heard_at > HEARD_SECONDS)

    def _has_seen(self, now: float) -> bool:
        """Tell whether this service has seen something not stored."""
        refused_at = self._broker.unstored_at
        if refused_at is not None and refused_at > self._broker.stored_at and now - refused_at < DOUBT_SECONDS:
            return True
        return bool(self._refused) or self._is_stuck()

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            await self.probe()
            await asyncio.sleep(PROBE_SECONDS)

    async def poll(self) -> None:
        """Probe if the last time is long enough ago."""
        if asyncio.get_running_loop().time() - self._probed_at >= PROBE_SECONDS:
            await self.probe()

    async def probe(self) -> None:
        """Write something, note whether the broker stores it, and tell the others if not."""
        self._probed_at = asyncio.get_running_loop().time()
        if not self._broker.is_connected:
            return  # a broker that is away says nothing about its disk
        if not self._listens:
            self._listens = True
            self._broker.on_reconnect(self._forget)
            await self._broker.subscribe(REFUSED_SUBJECT, self._hear)
        before = self.stores()
        await asyncio.gather(*(self._write(subject) for subject in self._subjects))
        if self._has_seen(asyncio.get_running_loop().time()) and self._broker.is_connected:
            await self._broker.publish(REFUSED_SUBJECT, self._name)
        now = self.stores()
        STORES.set(now)
        if before and not now:
            log.error("the broker does not store what it is sent: its disk may be full")
        elif now and not before:
            log.info("the broker stores again")

    async def _write(self, subject: str) -> None:
        reconnects = self._broker.reconnects
        try:
            await self._broker.publish_stored(subject, b"1", timeout=PROBE_TIMEOUT)
        except (BrokerUnavailable, APIError):
            if self._broker.is_connected and self._broker.reconnects == reconnects:
                self._refused.add(subject)
        else:
            self._refused.discard(subject)

    async def _hear(self, msg: Message) -> None:
        if msg.data != self._name:
            self._heard_at = asyncio.get_running_loop().time()

    async def _forget(self) -> None:
        """Begin anew with a broker that may have been started anew."""
        self._refused.clear()
        self._heard_at = None
        self._broker.unstored_at = None
