"""Limit calls to a provider: concurrent streams, and calls a minute. Waiting calls are admitted by priority and age."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from heapq import heapify, heappop, heappush
from typing import Final

from schemas.requests import Priority
from services.producer import metrics
from services.producer.core.token_bucket import TokenBucket

__all__ = ["UpstreamLimiter", "UpstreamLimits"]

_RANK: Final[dict[Priority, int]] = {"interactive": 0, "batch": 1}
_MINUTE: Final = 60.0
_SHORTEST_WAIT: Final = 0.001
"""Seconds: a timer that fires a rounding error too early must not fire again at once."""


class UpstreamLimiter:
    """Enforce one provider's limits in this process; ``None`` sets no limit.

    A waiting call holds a slot of the worker, so that the number of waiting calls is bounded as well.
    """

    def __init__(self, provider: str, max_streams: int | None, per_minute: int | None) -> None:
        self._max_streams = max_streams
        self._bucket = TokenBucket(per_minute, _MINUTE) if per_minute else None
        self._running = 0
        self._order = 0
        self._waiting: list[tuple[int, float, int, asyncio.Future[None]]] = []  # a heap; bounded by the worker's slots
        self._timer: asyncio.TimerHandle | None = None  # fires when the bucket has a token again
        self._gauge = metrics.LIMITED.labels(provider)

    @asynccontextmanager
    async def slot(self, priority: Priority, since: float) -> AsyncIterator[None]:
        """Wait until a call is allowed, and count it as running while the block runs.

        ``since``: when the request was made; of calls with the same priority the oldest is admitted first.
        """
        await self._acquire(_RANK[priority], since)
        try:
            yield
        finally:
            self._running -= 1
            self._admit()

    async def _acquire(self, rank: int, since: float) -> None:
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._order += 1
        heappush(self._waiting, (rank, since, self._order, admitted))
        self._admit()
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.done() and not admitted.cancelled():  # admitted and cancelled at once
                self._running -= 1
            else:
                self._waiting = [entry for entry in self._waiting if entry[3] is not admitted]
                heapify(self._waiting)
            self._admit()
            raise

    def _admit(self) -> None:
        """Admit waiting calls in order, as many as both limits allow now."""
        while self._waiting and (self._max_streams is None or self._running < self._max_streams):
            admitted = self._waiting[0][3]
            is_cancelled = admitted.done()  # its task has not run yet
            if not is_cancelled and not self._take_token():
                break
            heappop(self._waiting)
            if not is_cancelled:
                self._running += 1
                admitted.set_result(None)
        self._gauge.set(len(self._waiting))

    def _take_token(self) -> bool:
        """Take a token of the calls per minute; without one, schedule `_admit` for when there is one."""
        if self._bucket is None:
            return True
        loop = asyncio.get_running_loop()
        wait = self._bucket.take(loop.time())
        if wait and self._timer is None:
            self._timer = loop.call_later(max(wait, _SHORTEST_WAIT), self._refilled)
        return not wait

    def _refilled(self) -> None:
        self._timer = None
        self._admit()


class UpstreamLimits:
    """The limiters of all providers."""

    def __init__(self) -> None:
        self._limiters: dict[str, UpstreamLimiter] = {}  # one for each configured provider

    def of(self, provider: str, max_streams: int | None, per_minute: int | None) -> UpstreamLimiter:
        """Return the limiter of a provider; the first call creates it with these limits."""
        limiter = self._limiters.get(provider)
        if limiter is None:
            limiter = self._limiters[provider] = UpstreamLimiter(provider, max_streams, per_minute)
        return limiter
