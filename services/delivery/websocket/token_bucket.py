"""How fast a client may talk: a bucket of tokens that fills with time."""

__all__ = ["TokenBucket"]


class TokenBucket:
    """Allows ``burst`` at once and ``rate`` per second on average. Times in seconds of any monotonic clock."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = now

    def take(self, cost: float, now: float) -> float:
        """Take ``cost``; return for how many seconds nothing more should be taken, 0 when there is enough."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate) - cost
        self._at = now
        return max(0.0, -self._left / self._rate)
