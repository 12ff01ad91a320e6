"""Limit the rate of a client's messages with a token bucket."""

__all__ = ["TokenBucket"]


class TokenBucket:
    """Allow ``burst`` tokens at once and ``rate`` tokens per second on average. Times in monotonic seconds."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = now

    def take(self, cost: float, now: float) -> float:
        """Take ``cost`` tokens; return the seconds to wait before the next take, 0 when the bucket is not overdrawn."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate) - cost
        self._at = now
        return max(0.0, -self._left / self._rate)
