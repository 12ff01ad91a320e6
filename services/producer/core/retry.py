"""Retry policy: which failed calls are made again, and after which pause. tenacity drives it."""

from typing import Final, Literal

import msgspec
from tenacity import RetryCallState, wait_incrementing, wait_random, wait_random_exponential

from services.producer.core.parts import UpstreamFailure

__all__ = ["REFUSED", "CallFailed", "RetryPolicy", "helps_elsewhere"]

_DEFAULT_ON: Final = (
    "upstream_rate_limited",
    "upstream_overloaded",
    "upstream_error",
    "upstream_unreachable",
    "upstream_cut_off",
    "deadline_connect",
    "deadline_first_token",
)


REFUSED: Final = frozenset({"upstream_unauthorized", "upstream_not_found", "upstream_rate_limited"})
"""Failures caused by the candidate, not by the request: key, balance, permission, model, quota."""


def helps_elsewhere(failure: UpstreamFailure) -> bool:
    """Return whether another candidate may succeed after this failure: not if the request itself is at fault."""
    return failure.recoverable or failure.code in REFUSED


class CallFailed(Exception):
    """One call of one candidate failed with ``failure``."""

    def __init__(self, failure: UpstreamFailure) -> None:
        self.failure = failure
        super().__init__(f"{failure.code}: {failure.message}")


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and pauses of the calls to one candidate.

    ``wait``: ``exponential`` draws each pause at random below a bound that doubles from ``base`` (full jitter);
    ``linear`` increases pauses by ``base`` each, half of it at random. ``maximum`` bounds a pause; a provider that
    requests a longer one (``Retry-After``) is not called again. ``on``: codes of failures to retry.
    """

    max_attempts: int = 3
    wait: Literal["exponential", "linear"] = "exponential"
    base: float = 0.5
    maximum: float = 20.0
    on: tuple[str, ...] = _DEFAULT_ON

    def retries(self, failure: UpstreamFailure) -> bool:
        """Return whether to call the same candidate again after this failure."""
        patient = failure.retry_after is None or failure.retry_after <= self.maximum
        return failure.recoverable and failure.code in self.on and patient

    def pause(self, state: RetryCallState) -> float:
        """Return the seconds until the next call, by tenacity's strategies; at least the provider's ``Retry-After``."""
        if self.wait == "linear":
            steady = wait_incrementing(start=self.base / 2, increment=self.base, max=self.maximum)
            drawn = float((steady + wait_random(0, self.base / 2))(state))
        else:
            drawn = float(wait_random_exponential(multiplier=self.base, max=self.maximum)(state))
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.failure.retry_after if isinstance(error, CallFailed) else None
        return min(max(drawn, asked or 0.0), max(self.maximum, asked or 0.0))
