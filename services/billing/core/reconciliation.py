"""Reconcile Tailrace's counts with the provider's report."""

import msgspec

from services.billing.core.generation import Generation, Status
from services.billing.core.prices import glob

__all__ = ["Policy", "Tolerance", "reconcile"]


class Tolerance(msgspec.Struct, frozen=True, kw_only=True):
    """The tolerance of a comparison: two numbers agree if they differ by no more than ``absolute`` tokens or
    ``relative`` of the reported number, whichever is more. ``model`` is a pattern for ``provider/model`` with ``*`` and
    ``?``.
    """

    model: str = "*"
    absolute: int = 8
    relative: float = 0.02

    def agree(self, counted: int, reported: int) -> bool:
        """Return whether the two numbers agree within the tolerance."""
        return abs(reported - counted) <= max(self.absolute, self.relative * reported)


class Policy(Tolerance, frozen=True, kw_only=True):
    """The default tolerance, overrides for some models (the first match wins), and the time a provider has to report.

    ``grace`` in seconds.
    """

    grace: float = 300.0
    models: tuple[Tolerance, ...] = ()

    def tolerance(self, g: Generation) -> Tolerance:
        """Return the tolerance for a generation's model."""
        if not self.models:
            return self
        name = f"{g.provider}/{g.upstream_model or g.model}"
        return next((t for t in self.models if glob(t.model).fullmatch(name)), self)


def reconcile(g: Generation, now: int, policy: Policy) -> Generation:
    """Return ``g`` with its status, drifts and next decision time as of ``now`` (milliseconds since 1970).

    Pure and repeatable: it depends on the folded numbers only, so a late report leads to a new decision. Input is
    compared only if it was counted.
    """
    status: Status
    settle_at: int | None = None
    drift_input = None if g.input is None or not g.counted_input else g.input - g.counted_input
    drift_output = None if g.output is None else g.output - g.counted_output
    if not g.ended:
        status, drift_input, drift_output = "running", None, None
    elif g.state != "completed":
        status = "partial"
    elif g.input is None or g.output is None:
        settle_at = (g.ended_at or 0) + round(policy.grace * 1_000)
        status = "awaiting_provider" if now < settle_at else "provider_missing"
        settle_at = settle_at if status == "awaiting_provider" else None
    else:
        tolerance = policy.tolerance(g)
        agreed = tolerance.agree(g.counted_output, g.output) and (
            not g.counted_input or tolerance.agree(g.counted_input, g.input)
        )
        status = "matched" if agreed else "drift"
    return msgspec.structs.replace(
        g, status=status, drift_input=drift_input, drift_output=drift_output, settle_at=settle_at
    )
