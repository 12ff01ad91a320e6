"""A token bucket: allow a number of calls a period, refilled steadily. Pure; time is an argument."""

import math

__all__ = ["TokenBucket"]


class TokenBucket:
    """Hold at most ``capacity`` tokens and refill ``capacity`` of them in ``period`` seconds. It starts full."""

    __slots__ = ("_at", "_capacity", "_rate", "_tokens")

    def __init__(self, capacity: int, period: float) -> None:
        self._capacity = float(capacity)
        self._rate = capacity / period
        self._tokens = self._capacity
        self._at = -math.inf

    def take(self, now: float) -> float:
        """Take a token and return 0, or return the seconds until the next one."""
        self._tokens = min(self._capacity, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            return 0.0
        return (1.0 - self._tokens) / self._rate
