"""Detect a broker that does not store messages: a full disk shows only as missing acknowledgements."""

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
STORES: Final = Gauge("tailrace_log_writable", "Whether the broker stores messages (1) or not (0)")
PROBE_SECONDS: Final = 5.0
PROBE_TIMEOUT: Final = 3.0
DOUBT_SECONDS: Final = 15.0
"""Seconds for which an unacknowledged write counts against the broker, unless another one is acknowledged."""
REPORT_SECONDS: Final = 12.0
"""Seconds for which another service's report counts; each repeats it while it is valid."""


def _never() -> bool:
    return False


class Storage:
    """Probe the broker with small writes, and combine the results of the service's own writes and other services'
    reports.

    After a failed write, nats-server refuses a stream until a restart, even with free space; another stream may have
    had room in its last file. So each service sees only a part. ``is_stuck``: further evidence of the service.
    """

    def __init__(self, broker: Broker, service: str, is_stuck: Callable[[], bool] = _never) -> None:
        self._broker = broker
        self._subjects = probe_subjects(service)
        self._is_stuck = is_stuck
        self._name = secrets.token_bytes(8)
        self._refused: set[str] = set()  # subjects that were not stored
        self._reported_at: float | None = None
        self._probed_at = 0.0
        self._listens = False
        STORES.set(1)

    def stores(self) -> bool:
        """Return whether the broker stores messages, as far as known."""
        now = asyncio.get_running_loop().time()
        return not self._has_seen(now) and (self._reported_at is None or now - self._reported_at > REPORT_SECONDS)

    def _has_seen(self, now: float) -> bool:
        """Return whether this service has seen a failed write."""
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
        """Probe if the last probe is old enough."""
        if asyncio.get_running_loop().time() - self._probed_at >= PROBE_SECONDS:
            await self.probe()

    async def probe(self) -> None:
        """Write to the probe subjects, record the result, and report a failure to the other services."""
        self._probed_at = asyncio.get_running_loop().time()
        if not self._broker.is_connected:
            return  # a broker that is away gives no evidence about its disk
        if not self._listens:
            self._listens = True
            self._broker.on_reconnect(self._forget)
            await self._broker.subscribe(REFUSED_SUBJECT, self._receive_report)
        before = self.stores()
        await asyncio.gather(*(self._write(subject) for subject in self._subjects))
        if self._has_seen(asyncio.get_running_loop().time()) and self._broker.is_connected:
            await self._broker.publish(REFUSED_SUBJECT, self._name)
        now = self.stores()
        STORES.set(now)
        if before and not now:
            log.error("the broker stopped storing messages: its disk may be full")
        elif now and not before:
            log.info("the broker stores messages again")

    async def _write(self, subject: str) -> None:
        reconnects = self._broker.reconnects
        try:
            await self._broker.publish_stored(subject, b"1", timeout=PROBE_TIMEOUT)
        except (BrokerUnavailable, APIError):
            if self._broker.is_connected and self._broker.reconnects == reconnects:
                self._refused.add(subject)
        else:
            self._refused.discard(subject)

    async def _receive_report(self, msg: Message) -> None:
        if msg.data != self._name:
            self._reported_at = asyncio.get_running_loop().time()

    async def _forget(self) -> None:
        """Reset the evidence after a reconnection: the broker may have restarted."""
        self._refused.clear()
        self._reported_at = None
        self._broker.unstored_at = None
