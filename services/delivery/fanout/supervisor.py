"""End subscribers, sockets, calls and pulls that stall, reach their lifetime, expire, or must drain."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, suppress
from typing import Any, Final, Protocol

from services.delivery.fanout.open_streams import OpenStreams
from services.delivery.settings import Settings
from services.kit.auth.principal import Principal
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker
from services.kit.problem import Problem
from services.kit.tasks import BackgroundTasks

__all__ = ["Supervised", "Supervisor"]

POLL_SECONDS: Final = 1.0


class Supervised(Protocol):
    """Port of a connection, or a part of one, that the supervisor can end. Times are monotonic seconds.

    ``blocked_at``: time since which a write waits for the client; ``None`` without one. ``until`` and ``until_reason``:
    its deadline and the reason (``lifetime`` or ``expired``).
    """

    @property
    def blocked_at(self) -> float | None:
        """Time since which a write waits for the client."""

    @property
    def until(self) -> float:
        """Deadline at which it ends."""

    @property
    def until_reason(self) -> str:
        """Reason of the end at the deadline."""

    def stop(self, reason: str) -> None:
        """End it; the first reason holds. Reasons of the supervisor: evicted, drain, lifetime, expired."""

    def poll(self, now: float) -> None:
        """Run due work, such as a heartbeat; called about every second until it has to end."""


class Supervisor:
    """Poll supervised connections about every second, and run periodic jobs.

    Evicts a connection whose write has waited for ``stall`` seconds, ends one that has reached its lifetime or whose
    credentials have expired, and ends all of them when the replica drains.
    """

    def __init__(self, broker: Broker, clock: Clock, settings: Settings) -> None:
        self.open_streams = OpenStreams(
            total=settings.streams, tenant=settings.streams_per_tenant, key=settings.streams_per_key
        )
        self.draining = False
        self._broker = broker
        self._clock = clock
        self._stall = settings.stall
        self._lifetime = settings.lifetime
        self._supervised: set[Supervised] = set()  # bounded by the server's connections and calls
        self._jobs: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {}
        self._sweeps: list[Callable[[float], None]] = []
        self._running: set[object] = set()  # keys of jobs that have not ended
        self._tasks = BackgroundTasks()  # bounded by the keys of `start`

    def check(self, principal: Principal) -> None:
        """Refuse a stream that this replica cannot take.

        Raises:
            Problem: 429 or 503, too many are open; 503, the replica is draining.
        """
        self.open_streams.check(principal)
        if self.draining:
            raise Problem(503, "this replica is going away", headers={"Retry-After": "1"})

    def is_ready(self) -> bool:
        """Return whether new streams can be opened."""
        return self._broker.is_connected and not self.draining

    def end_of(self, expires_at: float | None) -> tuple[float, str]:
        """Return the deadline of a stream that begins now, in monotonic seconds, and its reason.

        The reason is ``lifetime`` or ``expired``. ``expires_at``: expiry of its credentials, in seconds since 1970.
        """
        now = self._clock.monotonic()
        until = now + self._lifetime * random.uniform(0.8, 1.0)  # jitter: clients must not reconnect all at once
        if expires_at is not None and now + expires_at - self._clock.wall() < until:
            return now + expires_at - self._clock.wall(), "expired"
        return until, "lifetime"

    def supervise(self, principal: Principal, supervised: Supervised) -> AbstractContextManager[None]:
        """Count a stream as open, and supervise it, while the block runs."""
        return _Supervision(self, principal, supervised)

    def every_second(self, name: str, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start ``job`` about every second while the broker is connected, unless it still runs."""
        self._jobs[name] = job

    def on_poll(self, sweep: Callable[[float], None]) -> None:
        """Call ``sweep`` with the monotonic time about every second."""
        self._sweeps.append(sweep)

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self.poll(self._clock.monotonic())

    def poll(self, now: float) -> None:
        """Run one round: end or poll each connection, call the sweeps, start the jobs."""
        for supervised in tuple(self._supervised):
            reason = self._due(supervised, now)
            if reason is None:
                supervised.poll(now)
            else:
                supervised.stop(reason)
        for sweep in self._sweeps:
            sweep(now)
        if self._broker.is_connected:
            for name, job in self._jobs.items():
                self.start(name, job())

    def start(self, key: object, job: Coroutine[Any, Any, None]) -> None:
        """Run a job in the background, unless one with the same key still runs: a slow broker must not be flooded."""
        if key in self._running:
            job.close()
            return
        self._running.add(key)
        task = self._tasks.start(job, name=getattr(job, "__qualname__", "job"))
        task.add_done_callback(lambda _: self._running.discard(key))

    async def drain(self, seconds: float) -> None:
        """End every stream with a resumable notice; wait at most ``seconds`` for slow clients."""
        self.draining = True
        for supervised in tuple(self._supervised):
            supervised.stop("drain")
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.open_streams.quiet.wait()

    async def close(self) -> None:
        """End background jobs."""
        await self._tasks.close()

    def _due(self, supervised: Supervised, now: float) -> str | None:
        """Return the reason why a connection has to end now, or ``None``."""
        blocked_at = supervised.blocked_at
        if blocked_at is not None and now - blocked_at > self._stall:
            return "evicted"
        if self.draining:
            return "drain"
        return supervised.until_reason if now > supervised.until else None


class _Supervision:
    """Supervise one stream. Takes a tenth of a generator's memory, since there are many."""

    __slots__ = ("_held", "_supervised", "_supervisor")

    def __init__(self, supervisor: Supervisor, principal: Principal, supervised: Supervised) -> None:
        self._supervisor = supervisor
        self._supervised = supervised
        self._held = supervisor.open_streams.held(principal, supervised.stop)

    def __enter__(self) -> None:
        self._held.__enter__()
        self._supervisor._supervised.add(self._supervised)
        if self._supervisor.draining:
            self._supervised.stop("drain")

    def __exit__(self, *_: object) -> None:
        self._supervisor._supervised.discard(self._supervised)
        self._held.__exit__(None, None, None)
