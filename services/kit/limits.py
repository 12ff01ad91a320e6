"""Rate limits counted by all replicas together: a storage for the library `limits` on JetStream's counters.

A count is one message with ``Nats-Incr``, whose acknowledgement holds the sum: exact under concurrent counts. If the
broker does not answer in time, the replica counts locally, so that a slow broker refuses no request.
"""

import asyncio
import hashlib
import math
from collections.abc import Callable
from typing import Final

import msgspec
import structlog
from limits.aio.storage import Storage
from limits.aio.storage.base import SlidingWindowCounterSupport

from schemas.topology import COUNTERS
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable

__all__ = ["CounterStorage"]

log = structlog.get_logger()
ANSWER_SECONDS: Final = 0.25
FULL_SECONDS: Final = 1.0
BLIND_SECONDS: Final = 1.0  # after a timeout, count locally for this long
WINDOWS: Final = 20_000  # cached; beyond it, past windows are dropped


class _Ack(msgspec.Struct):
    val: str | None = None


class _Window:
    """The cached count of one key in one window."""

    __slots__ = ("own", "shared", "updated_at")

    def __init__(self) -> None:
        self.shared = 0  # the last sum from the broker
        self.updated_at = -math.inf
        self.own = 0  # counted locally while the broker did not answer


class CounterStorage(Storage, SlidingWindowCounterSupport):
    """Counters in the stream `COUNTERS`, one subject for each key and window.

    ``on_silence`` is called for every count that the broker does not answer.
    """

    STORAGE_SCHEME = ["nats-counters"]

    def __init__(self, broker: Broker, clock: Clock, on_silence: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._broker = broker
        self._clock = clock
        self._on_silence = on_silence
        self._windows: dict[tuple[str, int, int], _Window] = {}  # bounded by WINDOWS
        self._blind_until = 0.0

    @property
    def base_exceptions(self) -> type[Exception]:
        """Return the error type of the storage."""
        return BrokerUnavailable

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count, and return whether the weighted sum of this window and the previous one is within ``limit``.

        While the window is full, the broker is asked at most once a second.
        """
        window, weight = self._now(expiry)
        before = weight * await self._sum(key, expiry, window - 1)
        here = self._window(key, expiry, window)
        is_full = before + here.shared + here.own + amount > limit
        if is_full and self._clock.monotonic() - here.updated_at < FULL_SECONDS:
            return False
        if before + await self._add(key, expiry, window, amount) <= limit:
            return True
        await self._add(key, expiry, window, -amount)
        return False

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Return count and remaining seconds of the previous window, and of this one."""
        window, weight = self._now(expiry)
        left = weight * expiry
        return await self._sum(key, expiry, window - 1), left, self._known(key, expiry, window), left + expiry

    async def clear_sliding_window(self, key: str, expiry: int) -> None:
        """Reset the counts of this window and the previous one."""
        window, _ = self._now(expiry)
        for each in (window - 1, window):
            counted = await self._add(key, expiry, each, 0)
            await self._add(key, expiry, each, -counted)

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Count in a fixed window and return the sum."""
        return await self._add(key, expiry, self._now(expiry)[0], amount)

    async def get(self, key: str) -> int:
        """Return the latest known sum of a key in any window."""
        return max((w.shared + w.own for (name, _, _), w in self._windows.items() if name == key), default=0)

    async def get_expiry(self, key: str) -> float:
        """Return the end of a key's current window, in seconds since 1970."""
        spans = [expiry * (window + 1) for (name, expiry, window) in self._windows if name == key]
        return float(max(spans, default=self._clock.wall()))

    async def check(self) -> bool:
        """Return whether the broker is connected."""
        return self._broker.is_connected

    async def reset(self) -> int | None:
        """Drop all cached counts; the broker's counters stay."""
        self._windows.clear()
        return None

    async def clear(self, key: str) -> None:
        """Drop the cached counts of a key."""
        for known in [name for name in self._windows if name[0] == key]:
            del self._windows[known]

    def _now(self, expiry: int) -> tuple[int, float]:
        """Return the number of the current window, and the weight of the previous one."""
        position = self._clock.wall() / expiry
        return math.floor(position), 1 - position % 1

    def _window(self, key: str, expiry: int, window: int) -> _Window:
        found = self._windows.get((key, expiry, window))
        if found is None:
            if len(self._windows) >= WINDOWS:
                now = self._clock.wall()
                self._windows = {k: w for k, w in self._windows.items() if (k[2] + 2) * k[1] > now}
            found = self._windows[key, expiry, window] = _Window()
        return found

    def _known(self, key: str, expiry: int, window: int) -> int:
        found = self._windows.get((key, expiry, window))
        return found.shared + found.own if found is not None else 0

    async def _sum(self, key: str, expiry: int, window: int) -> int:
        """Return a window's count; a past window is fetched only once, because it does not change."""
        if (key, expiry, window) not in self._windows:
            await self._add(key, expiry, window, 0)
        return max(0, self._known(key, expiry, window))

    async def _add(self, key: str, expiry: int, window: int, amount: int) -> int:
        here = self._window(key, expiry, window)
        if self._clock.monotonic() >= self._blind_until:
            try:
                here.shared = await self._ask(_subject(key, expiry, window), amount)
                here.updated_at = self._clock.monotonic()
                return here.shared + here.own
            except (BrokerUnavailable, TimeoutError, ValueError) as error:
                self._blind_until = self._clock.monotonic() + BLIND_SECONDS
                log.warning("rate counters did not answer, counting locally", detail=str(error))
        self._on_silence()
        here.own += amount
        here.updated_at = self._clock.monotonic()
        return here.shared + here.own

    async def _ask(self, subject: str, amount: int) -> int:
        async with asyncio.timeout(ANSWER_SECONDS):
            answer = await self._broker.request(subject, timeout=ANSWER_SECONDS, headers={"Nats-Incr": f"{amount:+d}"})
        value = msgspec.json.decode(answer or b"{}", type=_Ack).val
        if value is None:
            raise BrokerUnavailable(f"the broker does not count: {(answer or b'nobody answers')[:200]!r}")
        return int(value)


def _subject(key: str, expiry: int, window: int) -> str:
    digest = hashlib.sha256(f"{expiry}\0{key}".encode()).hexdigest()[:32]
    return f"{COUNTERS.lower()}.{digest}.{window}"
