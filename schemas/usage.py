"""Token usage, normalised over providers.

The classes are nested in counting, as OpenAI reports them: ``input`` is *all* input tokens and includes
``cached_input`` and ``cache_write``, which includes ``cache_write_1h``; ``output`` is *all* output tokens and includes
``reasoning``. Dialects that count otherwise are converted when parsed.
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
"""The largest whole number that JSON carries exactly to every language; a database column holds it too."""

Number = Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)]
"""A count or an index. Only reading checks the bounds."""

Epoch = Annotated[int, msgspec.Meta(ge=1, le=MAX_NUMBER)]
"""Which attempt of a producer: 1, 2 …"""

UNREADABLE: Final = "usage_unreadable"
INCONSISTENT: Final = "usage_inconsistent"
TOTAL: Final = "usage_total"
SHRUNK: Final = "usage_shrunk"
AUDIO: Final = "audio_tokens"
USAGE_REASONS: Final = (UNREADABLE, INCONSISTENT, TOTAL, SHRUNK, AUDIO)
"""Why a report may be wrong as it was read.

``usage_unreadable``: something in it was no number in range and was left out. ``usage_inconsistent``: a class was
larger than the one it is part of, which was raised to hold it. ``usage_total``: the provider's total is not the sum of
its classes; what a larger total holds beyond them counts as reasoning. ``usage_shrunk``: a later report of the same
answer told less; the larger numbers hold. ``audio_tokens``: it has audio tokens, which are priced as text.
"""


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a provider says that a generation used, in tokens.

    ``cache_write`` counts all tokens written to a prompt cache, ``cache_write_1h`` those of them that are kept for an
    hour. ``cost`` is an exact decimal number in ``currency``, as text, where the provider states one (OpenRouter).
    ``billed_input`` and ``billed_output`` are set where a provider bills other numbers than it processed (Cohere).
    ``reasons``: out of `USAGE_REASONS`. ``raw`` keeps the provider's own object unchanged.
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
        """Whether it counts nothing and states no cost."""
        return self.cost is None and not (
            any(getattr(self, name) for name in COUNTS) or self.billed_input or self.billed_output
        )


COUNTS: Final = ("input", "output", "cached_input", "cache_write", "cache_write_1h", "reasoning")
"""Fields of `Usage` that count tokens processed."""


def nested(usage: Usage) -> Usage:
    """Return ``usage`` with every class at least as large as its parts; a change adds ``usage_inconsistent``."""
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
    """Return two cumulative reports of one answer as one: each count is the larger one, the rest is the newest.

    A count that is smaller later, and not 0, adds ``usage_shrunk``.
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
    """Return ``reasons`` and those of ``more`` that are not among them, in the order in which they came."""
    return tuple(dict.fromkeys((*reasons, *more)))


def _larger(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else max(one, other)


def _cost(usage: Usage) -> Decimal:
    return Decimal(-1) if usage.cost is None else Decimal(usage.cost)


class Counted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Tailrace's own count of a generation, in tokens.

    ``exact`` is true where ``encoding`` is the model's own; otherwise the number is an estimate made with ``encoding``.
    """

    input: Number = 0
    output: Number = 0
    exact: bool = False
    encoding: str = ""
