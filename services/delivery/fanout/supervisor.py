"""Ends what lasts too long, reads too slowly, or is to make way: subscribers, sockets, calls and pulls alike."""

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
from services.kit.shutdown import end

__all__ = ["Supervised", "Supervisor"]

POLL_SECONDS: Final = 1.0


class Supervised(Protocol):
    """A connection, or a part of one, that the supervisor ends. Times are monotonic seconds.

    ``blocked_at``: since when a write has waited for the client; ``None`` while none does. ``until`` and
    ``until_reason``: when it has to end at the latest, and why (``lifetime`` or ``expired``).
    """

    @property
    def blocked_at(self) -> float | None:
        """Since when a write has waited for the client."""

    @property
    def until(self) -> float:
        """When it has to end at the latest."""

    @property
    def until_reason(self) -> str:
        """Why it ends then."""

    def stop(self, reason: str) -> None:
        """End it; the first reason holds. Reasons of the supervisor: evicted, drain, lifetime, expired."""

    def poll(self, now: float) -> None:
        """Do what is due, such as a heartbeat; called about every second while it need not end."""


class Supervisor:
    """Polls everything supervised about every second, and runs periodic jobs.

    Evicts what has not taken a write for ``stall`` seconds, ends what has reached its lifetime or whose credentials
    have expired, and, when the replica drains, all of it.
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
        self._tasks: set[asyncio.Task[None]] = set()  # bounded by the keys of `start`

    def check(self, principal: Principal) -> None:
        """Refuse a stream that this replica cannot take.

        Raises:
            Problem: 429 or 503, too many are open; 503, the replica is draining.
        """
        self.open_streams.check(principal)
        if self.draining:
            raise Problem(503, "this replica is going away", headers={"Retry-After": "1"})

    def is_ready(self) -> bool:
        """Tell whether new streams can be opened."""
        return self._broker.is_connected and not self.draining

    def end_of(self, expires_at: float | None) -> tuple[float, str]:
        """Return when a stream that begins now has to end, in monotonic seconds, and why: ``lifetime`` or ``expired``.

        ``expires_at``: of its credentials, in seconds since 1970.
        """
        now = self._clock.monotonic()
        until = now + self._lifetime * random.uniform(0.8, 1.0)  # replicas restart together: clients should not
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
        """Look at everything once."""
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
        """Run a job in the background, unless the one before under the same key has not ended: a slow broker is not
        asked ever more."""
        if key in self._running:
            job.close()
            return
        self._running.add(key)
        task: asyncio.Task[None] = asyncio.create_task(job)
        self._tasks.add(task)

        def ended(_: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._running.discard(key)

        task.add_done_callback(ended)

    async def drain(self, seconds: float) -> None:
        """End every stream with a resumable notice; wait at most so long for slow clients."""
        self.draining = True
        for supervised in tuple(self._supervised):
            supervised.stop("drain")
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.open_streams.quiet.wait()

    async def close(self) -> None:
        """End background jobs."""
        await end(*self._tasks)

    def _due(self, supervised: Supervised, now: float) -> str | None:
        """Return why something has to end now; ``None`` while it may go on."""
        blocked_at = supervised.blocked_at
        if blocked_at is not None and now - blocked_at > self._stall:
            return "evicted"
        if self.draining:
            return "drain"
        return supervised.until_reason if now > supervised.until else None


class _Supervision:
    """One stream under supervision. There are many: this takes a tenth of what a generator would."""

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
