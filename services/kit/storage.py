"""Whether the broker stores what it is sent: a full disk shows in nothing but acknowledgements that do not come."""

import asyncio
from typing import Final

import structlog
from nats.js.errors import APIError
from prometheus_client import Gauge

from schemas.log_marks import probe_subject
from services.kit.broker import Broker, BrokerUnavailable

__all__ = ["Storage"]

log = structlog.get_logger()
STORES: Final = Gauge("tailrace_log_writable", "Whether the broker stores what it is sent (1) or not (0)")
PROBE_SECONDS: Final = 5.0
PROBE_TIMEOUT: Final = 3.0
DOUBT_SECONDS: Final = 15.0
"""How long a write that was not acknowledged counts against the broker, unless another one is acknowledged."""


class Storage:
    """Writes a few bytes now and then, and heeds what becomes of the service's other writes.

    nats-server goes on refusing what it could not store once, also when there is space again, until it is started anew.
    """

    def __init__(self, broker: Broker, service: str) -> None:
        self._broker = broker
        self._subject = probe_subject(service)
        self._is_ok = True
        self._probed_at = 0.0
        STORES.set(1)

    def stores(self) -> bool:
        """Tell whether the broker stores what it is sent, as far as that is known."""
        now = asyncio.get_running_loop().time()
        refused_at = self._broker.unstored_at
        is_doubtful = (
            refused_at is not None and refused_at > self._broker.stored_at and now - refused_at < DOUBT_SECONDS
        )
        return self._is_ok and not is_doubtful

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            await self.probe()
            await asyncio.sleep(PROBE_SECONDS)

    async def look(self) -> None:
        """Probe if the last time is long enough ago."""
        if asyncio.get_running_loop().time() - self._probed_at >= PROBE_SECONDS:
            await self.probe()

    async def probe(self) -> None:
        """Write something, and note whether the broker stores it. A broker that is away says nothing about its disk."""
        self._probed_at = asyncio.get_running_loop().time()
        if not self._broker.is_connected:
            return
        reconnects = self._broker.reconnects
        try:
            await self._broker.publish_stored(self._subject, b"1", timeout=PROBE_TIMEOUT)
        except (BrokerUnavailable, APIError) as error:
            if not self._broker.is_connected or self._broker.reconnects != reconnects:
                return
            if self._is_ok:
                log.error("the broker does not store what it is sent: its disk may be full", detail=str(error))
            self._is_ok = False
        else:
            if not self._is_ok:
                log.info("the broker stores again")
            self._is_ok = True
        STORES.set(self._is_ok)
