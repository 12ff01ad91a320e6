"""Limits of an upstream: how many streams at once and how many calls a minute, who waits goes by priority and age."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from heapq import heapify, heappop, heappush
from typing import Final

from aiolimiter import AsyncLimiter

from schemas.requests import Priority
from services.producer import metrics

__all__ = ["UpstreamLimiter", "UpstreamLimits"]

_RANK: Final[dict[Priority, int]] = {"interactive": 0, "batch": 1}
_MINUTE: Final = 60.0


class UpstreamLimiter:
    """One upstream's limits in this process; ``None`` sets no bound. Who waits holds a slot of the worker, so that
    the number of those who wait is bounded as well.
    """

    def __init__(self, provider: str, max_streams: int | None, per_minute: int | None) -> None:
        self._max_streams = max_streams
        self._limiter = AsyncLimiter(per_minute, _MINUTE) if per_minute else None
        self._running = 0
        self._order = 0
        self._waiting: list[tuple[int, float, int, asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._gauge = metrics.GATE_WAITING.labels(provider)

    @asynccontextmanager
    async def passing(self, priority: Priority, since: float) -> AsyncIterator[None]:
        """Wait for a place, and hold it while the block runs. ``since``: when the request was made."""
        await self._enter(_RANK[priority], since)
        try:
            yield
        finally:
            self._running -= 1
            self._admit()

    async def _enter(self, rank: int, since: float) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._order += 1
        heappush(self._waiting, (rank, since, self._order, place))
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # admitted and cancelled at once
                self._running -= 1
            else:
                self._waiting = [who for who in self._waiting if who[3] is not place]
                heapify(self._waiting)
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting and (self._max_streams is None or self._running < self._max_streams):
            place = self._waiting[0][3]
            gone = place.done()  # cancelled, and its task has not run yet
            if not gone and self._limiter is not None and not self._take():
                break
            heappop(self._waiting)
            if not gone:
                self._running += 1
                place.set_result(None)
        self._gauge.set(len(self._waiting))

    def _take(self) -> bool:
        """Take one call out of the minute's; if there is none, look again soon."""
        assert self._limiter is not None
        if self._limiter.has_capacity():
            # With capacity `acquire` never waits: it is over with its first step.
            try:
                self._limiter.acquire().send(None)
            except StopIteration:
                return True
        if self._timer is None:
            pause = self._limiter.time_period / self._limiter.max_rate
            self._timer = asyncio.get_running_loop().call_later(min(pause, 1.0), self._look_again)
        return False

    def _look_again(self) -> None:
        self._timer = None
        self._admit()


class UpstreamLimits:
    """The gates of all upstreams."""

    def __init__(self) -> None:
        self._gates: dict[str, UpstreamLimiter] = {}

    def of(self, provider: str, max_streams: int | None, per_minute: int | None) -> UpstreamLimiter:
        """Return the gate of a provider with these limits."""
        gate = self._gates.get(provider)
        if gate is None:
            gate = self._gates[provider] = UpstreamLimiter(provider, max_streams, per_minute)
        return gate
