"""Token usage, normalised over providers.

The token classes are nested, as OpenAI reports them: ``input`` is *all* input tokens and includes ``cached_input`` and
``cache_write``, which includes ``cache_write_1h``; ``output`` is *all* output tokens and includes ``reasoning``.
Dialects that count otherwise are converted when parsed.
"""

from decimal import Decimal
from typing import Annotated, Any, Final

import msgspec

__all__ = [
    "AUDIO",
    "COUNTS",
    "INCONSISTENT",
    "MAX_NUMBER",
    "SHRUNK",
    "TOTAL",
    "UNREADABLE",
    "USAGE_REASONS",
    "Counted",
    "Epoch",
    "Number",
    "Usage",
    "grown",
    "nested",
    "with_reasons",
]

MAX_NUMBER = 2**53 - 1
"""The largest integer that JSON represents exactly in every language; it also fits a database column."""

Number = Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)]
"""A count or an index. The bounds are checked only when decoding."""

Epoch = Annotated[int, msgspec.Meta(ge=1, le=MAX_NUMBER)]
"""The attempt of a producer: 1, 2 …"""

UNREADABLE: Final = "usage_unreadable"
INCONSISTENT: Final = "usage_inconsistent"
TOTAL: Final = "usage_total"
SHRUNK: Final = "usage_shrunk"
AUDIO: Final = "audio_tokens"
USAGE_REASONS: Final = (UNREADABLE, INCONSISTENT, TOTAL, SHRUNK, AUDIO)
"""Reasons why a parsed report may be wrong.

``usage_unreadable``: a value was not a number in range and was omitted. ``usage_inconsistent``: a class was larger than
the class that contains it, which was raised. ``usage_total``: the provider's total is not the sum of its classes; the
excess of a larger total counts as reasoning. ``usage_shrunk``: a later report of the same answer had smaller numbers;
the larger ones are kept. ``audio_tokens``: it has audio tokens, which are priced as text.
"""


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The usage of a generation as its provider reports it, in tokens.

    ``cache_write`` counts all tokens written to a prompt cache, ``cache_write_1h`` those of them that are kept for an
    hour. ``cost`` is an exact decimal number in ``currency``, as text, if the provider states one (OpenRouter).
    ``billed_input`` and ``billed_output`` are set if a provider bills other numbers than it processed (Cohere).
    ``reasons``: a subset of `USAGE_REASONS`. ``raw`` keeps the provider's own object unchanged.
    """

    input: Number = 0
    output: Number = 0
    cached_input: Number = 0
    cache_write: Number = 0
    cache_write_1h: Number = 0
    reasoning: Number = 0
    billed_input: Number | None = None
    billed_output: Number | None = None
    cost: str | None = None
    currency: str | None = None
    reasons: tuple[str, ...] = ()
    raw: dict[str, Any] | None = None

    @property
    def blank(self) -> bool:
        """Return whether all counts are zero and no cost is stated."""
        return self.cost is None and not (
            any(getattr(self, name) for name in COUNTS) or self.billed_input or self.billed_output
        )


COUNTS: Final = ("input", "output", "cached_input", "cache_write", "cache_write_1h", "reasoning")
"""Fields of `Usage` that count processed tokens."""


def nested(usage: Usage) -> Usage:
    """Return ``usage`` with every class raised to at least its parts; a change adds ``usage_inconsistent``."""
    write = max(usage.cache_write, usage.cache_write_1h)
    held = usage.cached_input + write
    if usage.output >= usage.reasoning and usage.input >= held and write == usage.cache_write:
        return usage
    cached = min(usage.cached_input, MAX_NUMBER)
    write = min(write, MAX_NUMBER - cached)
    return msgspec.structs.replace(
        usage,
        input=max(usage.input, cached + write),
        output=max(usage.output, usage.reasoning),
        cached_input=cached,
        cache_write=write,
        cache_write_1h=min(usage.cache_write_1h, write),
        reasons=with_reasons(usage.reasons, INCONSISTENT),
    )


def grown(earlier: Usage, later: Usage) -> Usage:
    """Merge two cumulative reports of one answer: the larger of each count, everything else from the later report.

    A count that is smaller in the later report, and not 0, adds ``usage_shrunk``.
    """
    if later.blank:
        return earlier
    counts = {name: max(getattr(earlier, name), getattr(later, name)) for name in COUNTS}
    reasons = with_reasons(earlier.reasons, *later.reasons)
    if any(0 < getattr(later, name) < count for name, count in counts.items()):
        reasons = with_reasons(reasons, SHRUNK)
    dearer = later if _cost(later) >= _cost(earlier) else earlier
    return nested(
        Usage(
            **counts,
            billed_input=_larger(earlier.billed_input, later.billed_input),
            billed_output=_larger(earlier.billed_output, later.billed_output),
            cost=dearer.cost,
            currency=dearer.currency,
            reasons=reasons,
            raw=later.raw if later.raw is not None else earlier.raw,
        )
    )


def with_reasons(reasons: tuple[str, ...], *more: str) -> tuple[str, ...]:
    """Return ``reasons`` followed by those of ``more`` that are not among them, in order."""
    return tuple(dict.fromkeys((*reasons, *more)))


def _larger(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else max(one, other)


def _cost(usage: Usage) -> Decimal:
    return Decimal(-1) if usage.cost is None else Decimal(usage.cost)


class Counted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Tailrace's own count of a generation, in tokens.

    ``exact``: true if ``encoding`` is the model's own; otherwise the count is an estimate made with ``encoding``.
    """

    input: Number = 0
    output: Number = 0
    exact: bool = False
    encoding: str = ""
