"""Find the reasons why the counted and reported usage of a generation differ."""

from collections.abc import Iterator
from typing import Final

import msgspec

from schemas.usage import USAGE_REASONS, Usage
from services.billing.core.generation import Generation
from services.billing.core.reconciliation import Policy, Tolerance

__all__ = ["REASONS", "explain"]

REASONS: Final = (
    "cut_off",
    "estimate",
    "hidden_reasoning",
    "cached_tokens",
    "tool_calls",
    "billed_units",
    "attempts",
    "headless",
    *USAGE_REASONS,
)
_CUT_OFF: Final = "upstream_cut_off"


def explain(g: Generation, policy: Policy) -> str:
    """Return the reasons why ``g`` is not matched, separated by commas, in the order of `REASONS`.

    A matched generation has only the reasons from its usage report.
    """
    if g.status in ("running", "awaiting_provider"):
        return ""
    usage = msgspec.json.decode(g.usage, type=Usage) if g.usage else None
    found = list(_reasons(g, usage, policy.tolerance(g))) if g.status != "matched" else []
    doubts = usage.reasons if usage is not None else ()
    return ",".join((*found, *(reason for reason in USAGE_REASONS if reason in doubts)))


def _reasons(g: Generation, usage: Usage | None, tolerance: Tolerance) -> Iterator[str]:
    if g.state == "interrupted" or g.code == _CUT_OFF:
        yield "cut_off"
    if not g.counted_exact:
        yield "estimate"
    if usage is not None:
        if _hidden(g, usage, tolerance):
            yield "hidden_reasoning"
        if _cached(g, usage, tolerance):
            yield "cached_tokens"
        if g.code == "tool_calls" and not tolerance.agree(g.counted_output, usage.output):
            yield "tool_calls"
        if usage.billed_output not in (None, usage.output) or usage.billed_input not in (None, usage.input):
            yield "billed_units"
    if g.epoch > 1:
        yield "attempts"
    if g.headless:
        yield "headless"


def _hidden(g: Generation, usage: Usage, tolerance: Tolerance) -> bool:
    """Return whether the output agrees without reasoning that was never streamed."""
    if not usage.reasoning or tolerance.agree(g.counted_output, usage.output):
        return False
    return g.counted_output < usage.output and tolerance.agree(
        g.counted_output, max(g.counted_output, usage.output - usage.reasoning)
    )


def _cached(g: Generation, usage: Usage, tolerance: Tolerance) -> bool:
    """Return whether the input agrees with cached tokens subtracted or added."""
    cached = usage.cached_input + usage.cache_write
    if not cached or not g.counted_input or tolerance.agree(g.counted_input, usage.input):
        return False
    return any(tolerance.agree(g.counted_input, max(0, n)) for n in (usage.input - cached, usage.input + cached))
