"""Limit the generations that a tenant and a key may start per minute and run concurrently."""

import math
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import structlog
from limits import RateLimitItemPerMinute
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from schemas.requests import GenerationRecord
from schemas.topology import BUCKET, bucket_stream
from services.delivery import metrics
from services.delivery.requests.generations import ENDED
from services.delivery.settings import Settings
from services.kit.auth.principal import Principal
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.limits import CounterStorage
from services.kit.problem import Problem

__all__ = ["StartLimits"]

log = structlog.get_logger()
RECENT: Final = 20_000  # record changes read when a replica starts
FORGOTTEN_SECONDS: Final = 7_200.0  # longer than any generation: its record was not closed, but the log was
RETRY_SECONDS: Final = 5
_STREAM: Final = bucket_stream(BUCKET)
_PREFIX: Final = f"$KV.{BUCKET}."


class _Running(msgspec.Struct, frozen=True):
    tenant: str
    key: str
    since: float


class _Tally:
    """Count unfinished generations by tenant and key; entries by the record's name."""

    def __init__(self) -> None:
        self._entries: dict[str, _Running] = {}  # bounded by the records that are kept
        self.tenants: Counter[str] = Counter()
        self.keys: Counter[tuple[str, str]] = Counter()

    def put(self, name: str, running: _Running) -> None:
        self.drop(name)
        self._entries[name] = running
        self._count(running, 1)

    def drop(self, name: str) -> None:
        known = self._entries.pop(name, None)
        if known is not None:
            self._count(known, -1)

    def forget(self, before: float) -> None:
        for name in [name for name, running in self._entries.items() if running.since < before]:
            self.drop(name)

    def _count(self, running: _Running, amount: int) -> None:
        entry = (running.tenant, running.key)
        self.tenants[running.tenant] += amount
        self.keys[entry] += amount
        if not self.keys[entry]:
            del self.keys[entry]
        if not self.tenants[running.tenant]:
            del self.tenants[running.tenant]


class StartLimits:
    """Admit starts of generations.

    Running generations are counted from their records, which `poll` follows, plus the starts that this replica has just
    admitted: so replicas together may exceed a bound by the starts that others admit between two polls.
    """

    def __init__(self, broker: Broker, clock: Clock, settings: Settings) -> None:
        self._broker = broker
        self._clock = clock
        self._settings = settings
        self._counts_running = settings.running_per_tenant is not None or settings.running_per_key is not None
        self._limiter = SlidingWindowCounterRateLimiter(CounterStorage(broker, clock, metrics.LIMITS_BLIND.inc))
        self._running = _Tally()
        self._entering = _Tally()  # being admitted now
        self._incarnation = ""
        self._seq = 0

    @asynccontextmanager
    async def starting(self, principal: Principal) -> AsyncIterator[None]:
        """Admit one start; it counts as running while the block runs, and afterwards if `began` was called for it.

        Raises:
            Problem: 429, too many generations are started or running.
        """
        self._check_running(principal)
        await self._check_rates(principal)
        self._check_running(principal)
        name = secrets.token_hex(8)
        self._entering.put(name, _Running(principal.tenant, principal.key, self._clock.wall()))
        try:
            yield
        finally:
            self._entering.drop(name)

    def began(self, record: GenerationRecord) -> None:
        """Count a generation whose record has just been created."""
        if self._counts_running:
            name = f"{record.tenant}.{record.session}.{record.generation}"
            self._running.put(name, _Running(record.tenant, record.key, record.created_at))

    async def poll(self) -> None:
        """Apply changed records to the counts; to be called about every second."""
        if not self._counts_running:
            return
        try:
            await self._read_changes()
        except BrokerUnavailable as error:
            log.warning("running generations not counted", detail=str(error))

    async def _read_changes(self) -> None:
        state = await self._broker.state(_STREAM)
        if state.created != self._incarnation or state.last_seq < self._seq:
            self._running = _Tally()
            self._incarnation, self._seq = state.created, max(0, state.last_seq - RECENT)
        if state.last_seq > self._seq:
            async for batch in self._broker.read(_STREAM, _PREFIX + ">", self._seq + 1):
                for stored in batch:
                    self._take(stored.subject.removeprefix(_PREFIX), stored.data)
                self._seq = batch[-1].seq
            self._seq = max(self._seq, state.last_seq)
        self._running.forget(self._clock.wall() - FORGOTTEN_SECONDS)

    def _take(self, name: str, data: bytes) -> None:
        try:
            record = msgspec.json.decode(data, type=GenerationRecord) if data else None
        except msgspec.DecodeError:
            record = None
        if record is None or record.state in ENDED:
            self._running.drop(name)
        else:
            since = record.started_at or record.created_at
            self._running.put(name, _Running(record.tenant, record.key, since))

    def _check_running(self, principal: Principal) -> None:
        bounds, tenant, entry = self._settings, principal.tenant, (principal.tenant, principal.key)
        of_tenant = self._running.tenants[tenant] + self._entering.tenants[tenant]
        if bounds.running_per_tenant is not None and of_tenant >= bounds.running_per_tenant:
            raise _refused("running", "tenant", f"the tenant has {bounds.running_per_tenant} generations running")
        of_key = self._running.keys[entry] + self._entering.keys[entry]
        if bounds.running_per_key is not None and of_key >= bounds.running_per_key:
            raise _refused("running", "key", f"the credentials have {bounds.running_per_key} generations running")

    async def _check_rates(self, principal: Principal) -> None:
        bounds = self._settings
        if bounds.starts_per_minute_per_key is not None:
            await self._count(bounds.starts_per_minute_per_key, "key", principal.tenant, principal.key)
        if bounds.starts_per_minute_per_tenant is not None:
            await self._count(bounds.starts_per_minute_per_tenant, "tenant", principal.tenant)

    async def _count(self, rate: int, whose: str, *name: str) -> None:
        item = RateLimitItemPerMinute(rate, namespace=f"starts-{whose}")
        if await self._limiter.hit(item, *name):
            return
        reset = (await self._limiter.get_window_stats(item, *name)).reset_time
        wait = min(60, max(1, math.ceil(reset - self._clock.wall())))
        raise _refused("starts", whose, f"{rate} generations may be started a minute", wait)


def _refused(limit: str, whose: str, detail: str, wait: int = RETRY_SECONDS) -> Problem:
    metrics.LIMITED.labels(limit, whose).inc()
    slug, title = {
        "running": ("too-many-running", "Too many generations are running"),
        "starts": ("too-many-starts", "Too many generations are started"),
    }[limit]
    return Problem(429, detail, slug=slug, title=title, headers={"Retry-After": str(wait)})
