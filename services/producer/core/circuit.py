"""A circuit breaker: reject calls while their failures show an outage. Pure; time is an argument."""

from typing import Final, Literal

__all__ = ["Circuit", "CircuitState"]

CircuitState = Literal["closed", "half-open", "open"]
BLOCKED_LIMIT: Final = 8
"""Bound of the tenants that one circuit tracks separately: once two are blocked, it is open for all."""


class Circuit:
    """Open after ``threshold`` failures in a row; ``seconds`` later admit one trial call at a time.

    Failures of one tenant's calls open it for that tenant alone, because its requests may be at fault; failures of two
    tenants open it for all. So no tenant locks another one out. Times in seconds since 1970. ``call``: any object that
    identifies a call.
    """

    __slots__ = ("_failed", "_trial", "blocked", "failures", "for_all", "seconds", "threshold")

    def __init__(self, threshold: int, seconds: float) -> None:
        self.threshold = threshold
        self.seconds = seconds
        self.failures = 0
        self.blocked: dict[str, float] = {}  # end of the block by tenant; bounded by BLOCKED_LIMIT
        self.for_all = False  # open for all tenants, and no call has succeeded since
        self._failed: dict[str, float] = {}  # time of the last failure in a row by tenant; only two tenants
        self._trial: object | None = None

    @property
    def is_closed(self) -> bool:
        """Return whether it admits the calls of all tenants."""
        return not self.blocked and not self.for_all

    def state(self, tenant: str, now: float) -> CircuitState:
        """Return the state for a tenant's calls."""
        live = [name for name, until in self.blocked.items() if now < until]
        if tenant in live or len(live) > 1:
            return "open"
        return "half-open" if self.for_all or tenant in self.blocked else "closed"

    def admits(self, tenant: str, now: float, call: object) -> bool:
        """Return whether a call may be made now; a half-open circuit rejects others until this one has ended."""
        state = self.state(tenant, now)
        if state == "closed":
            return True
        if state == "open" or self._trial is not None:
            return False
        self._trial = call
        return True

    def succeed(self) -> bool:
        """Close after a successful call; return whether the state changed."""
        changed = not self.is_closed
        self.failures, self.for_all, self._trial = 0, False, None
        self.blocked.clear()
        self._failed.clear()
        return changed

    def fail(self, tenant: str, now: float, call: object) -> bool:
        """Count a failure of the upstream; return whether the state changed."""
        self.leave(call)
        self.failures += 1
        self._failed.pop(tenant, None)
        self._failed[tenant] = now
        while len(self._failed) > 2:
            del self._failed[next(iter(self._failed))]
        if not self.for_all and tenant not in self.blocked and self.failures < self.threshold:
            return False
        recent = [name for name, at in self._failed.items() if at > now - self.seconds]
        blamed = [tenant] if self.for_all else recent
        self.blocked |= dict.fromkeys(blamed, now + self.seconds)
        self.for_all = self.for_all or sum(now < until for until in self.blocked.values()) > 1
        while len(self.blocked) > BLOCKED_LIMIT:
            del self.blocked[min(self.blocked, key=self.blocked.__getitem__)]
        return True

    def leave(self, call: object) -> None:
        """End a call without an outcome; if it was the trial, admit another trial."""
        if self._trial is call:
            self._trial = None

    def adopt(self, blocked: dict[str, float], *, for_all: bool, now: float) -> None:
        """Adopt the blocked tenants of another producer's circuit, with the end of each block."""
        newest = sorted(blocked.items(), key=lambda item: item[1])[-BLOCKED_LIMIT:]
        self.blocked = {tenant: min(until, now + self.seconds) for tenant, until in newest}
        self.for_all = for_all
