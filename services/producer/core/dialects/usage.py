"""Read the usage objects of all providers leniently, and consistently with the provider's own total.

Reading never raises: a value that is not a number in range is omitted with a reason. Field names show how most
providers count; otherwise the provider's `UsageRules` or the total decide.
"""

import math
import re
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from schemas.usage import AUDIO, COUNTS, INCONSISTENT, MAX_NUMBER, TOTAL, UNREADABLE, Usage, nested, with_reasons

__all__ = ["STANDARD", "UsageReading", "UsageRules", "read_usage", "rules_of", "together"]


class UsageRules(msgspec.Struct, frozen=True, kw_only=True):
    """A provider's rules of counting that its field names do not show.

    ``reasoning_beside``: the output count excludes reasoning. ``thoughts_in_total``: reasoning is only in the total.
    ``currency``: of a cost in its usage object; without one a cost is ignored.
    """

    reasoning_beside: bool = False
    thoughts_in_total: bool = False
    currency: str | None = None


STANDARD: Final = UsageRules()
_GEMINI: Final = UsageRules(reasoning_beside=True, thoughts_in_total=True)
_RULES: Final[dict[str, UsageRules]] = {
    "x.ai": UsageRules(reasoning_beside=True),
    "perplexity.ai": UsageRules(reasoning_beside=True, currency="USD"),
    "generativelanguage.googleapis.com": _GEMINI,
    "aiplatform.googleapis.com": _GEMINI,
    "openrouter.ai": UsageRules(currency="USD"),
}
"""By host name or a parent domain of it."""


class UsageReading(NamedTuple):
    """The result of reading a usage object: usage, or ``None`` and the reasons."""

    usage: Usage | None
    reasons: tuple[str, ...] = ()


def rules_of(base_url: str) -> UsageRules:
    """Return the rules of the provider at an address; the standard rules for an unknown one."""
    host = urlsplit(base_url).hostname or ""
    return next((rules for name, rules in _RULES.items() if host == name or host.endswith(f".{name}")), STANDARD)


class _Shape(NamedTuple):
    """Names of the input and output counts, and whether these exclude cached tokens and reasoning."""

    input: str
    output: str
    cache_apart: bool = False
    reasoning_beside: bool = False


_SHAPES: Final = (
    _Shape("prompt_tokens", "completion_tokens"),
    _Shape("input_tokens", "output_tokens"),
    _Shape("native_tokens_prompt", "native_tokens_completion"),
    _Shape("tokens_prompt", "tokens_completion"),
    _Shape("promptTokenCount", "candidatesTokenCount", reasoning_beside=True),
    _Shape("prompt_token_count", "candidates_token_count", reasoning_beside=True),
    _Shape("inputTokens", "outputTokens", cache_apart=True),
    _Shape("prompt_eval_count", "eval_count"),
    _Shape("tokens_evaluated", "tokens_predicted"),
    _Shape("prompt_n", "predicted_n", cache_apart=True),
)
_Roles = dict[str, Any]
_CREATION: Final[_Roles] = {"ephemeral_5m_input_tokens": "written_5m", "ephemeral_1h_input_tokens": "written_1h"}
_INPUT_DETAILS: Final[_Roles] = {
    "cached_tokens": "cached",
    "cache_write_tokens": "written",
    "cache_creation_tokens": "written",
    "cache_creation_input_tokens": "written",
    "cache_creation": _CREATION,
    "cache_creation_token_details": _CREATION,
    "audio_tokens": "audio",
}
_OUTPUT_DETAILS: Final[_Roles] = {
    "reasoning_tokens": "reasoning",
    "thinking_tokens": "reasoning",
    "audio_tokens": "audio",
}
_ROLES: Final[_Roles] = {
    **{name: name for shape in _SHAPES for name in (shape.input, shape.output)},
    **dict.fromkeys(("total_tokens", "totalTokenCount", "total_token_count", "totalTokens"), "total"),
    **dict.fromkeys(("cached_tokens", "num_cached_tokens", "native_tokens_cached", "cache_n"), "cached"),
    **dict.fromkeys(("cachedContentTokenCount", "cached_content_token_count", "cacheReadInputTokens"), "cached"),
    **dict.fromkeys(("cache_write_tokens", "cacheWriteInputTokens"), "written"),
    **dict.fromkeys(("reasoning_tokens", "native_tokens_reasoning"), "reasoning"),
    **dict.fromkeys(("thoughtsTokenCount", "thoughts_token_count"), "reasoning"),
    **dict.fromkeys(("toolUsePromptTokenCount", "tool_use_prompt_token_count"), "tool_prompt"),
    "cache_read_input_tokens": "cached",
    "cache_creation_input_tokens": "written",
    "cache_creation": _CREATION,
    "prompt_cache_hit_tokens": "cached",
    "prompt_cache_miss_tokens": "missed",
    "prompt_tokens_details": _INPUT_DETAILS,
    "input_tokens_details": _INPUT_DETAILS,
    "completion_tokens_details": _OUTPUT_DETAILS,
    "output_tokens_details": _OUTPUT_DETAILS,
}
"""The meaning of each count by its name; nested for the fields of an object."""
_COHERE: Final[_Roles] = {
    "billed_units": {"input_tokens": "billed_input", "output_tokens": "billed_output"},
    "tokens": {"input_tokens": "input", "output_tokens": "output"},
    "cached_tokens": "cached",
}
_BILLED: Final[tuple[str, ...]] = ("billed_input", "billed_output")
_APART: Final = ("cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation")
"""Together with ``input_tokens`` these are Anthropic's fields, which its input excludes."""
_COSTS: Final = ("cost", "total_cost", "estimated_cost")
_TEXT: Final = re.compile(r"\s*\+?([0-9]{1,16})(\.0*)?\s*")
_encoder: Final = msgspec.json.Encoder(decimal_format="number")
_RAW_LIMIT: Final = 8 * 1024
"""Bytes of a provider's own object, as JSON, that are kept with its usage."""


class _Object:
    """A usage object while it is read: counts by role, and reasons to doubt them."""

    __slots__ = ("counts", "raw", "reasons")

    def __init__(self, raw: dict[str, Any], roles: _Roles) -> None:
        self.raw = raw
        self.counts: dict[str, int] = {}
        self.reasons: tuple[str, ...] = ()
        self._take(raw, roles)

    def _take(self, values: dict[str, Any], roles: _Roles) -> None:
        for name, value in values.items():
            role = roles.get(name)
            if role is None or value is None:
                continue
            if not isinstance(role, str):
                if isinstance(value, dict):
                    self._take(value, role)
                continue
            number = _number(value)
            if number is None or (isinstance(value, float | Decimal) and number != value):
                self.doubt(UNREADABLE)
            if number is not None and number >= self.counts.get(role, 0):
                self.counts[role] = number  # of several names for one count the largest is kept

    def doubt(self, reason: str) -> None:
        """Add a reason why the report may be wrong."""
        self.reasons = with_reasons(self.reasons, reason)

    def of(self, role: str) -> int:
        """Return a count, or 0 without one."""
        return self.counts.get(role, 0)


def read_usage(raw: object, rules: UsageRules = STANDARD) -> UsageReading:
    """Read a provider's usage object and normalise it.

    A missing or empty object is not an error; an object with neither a count nor a cost is.
    """
    if not raw:
        return UsageReading(None)
    if not isinstance(raw, dict):
        return UsageReading(None, (UNREADABLE,))
    cohere = isinstance(raw.get("billed_units"), dict) or isinstance(raw.get("tokens"), dict)
    read = _Object(raw, _COHERE if cohere else _ROLES)
    counts = _cohere(read) if cohere else _counts(read, rules)
    cost = _cost(read) if rules.currency else None
    if counts is None and cost is None:
        return UsageReading(None, read.reasons or (UNREADABLE,))
    if read.of("audio"):
        read.doubt(AUDIO)
    kept = _kept(read)
    usage = Usage(
        **(counts or {}),
        cost=cost,
        currency=rules.currency if cost is not None else None,
        reasons=read.reasons,
        raw=kept,
    )
    return UsageReading(nested(usage))


def together(usages: Iterable[Usage]) -> Usage:
    """Sum the usage of choices that report it separately; they share the input."""
    several = list(usages)
    summed = {
        name: min(MAX_NUMBER, sum(getattr(usage, name) for usage in several))
        if name in ("output", "reasoning")
        else max(getattr(usage, name) for usage in several)
        for name in COUNTS
    }
    reasons = with_reasons((), *(reason for usage in several for reason in usage.reasons))
    return nested(msgspec.structs.replace(several[-1], **summed, reasons=reasons))


class _Counts(NamedTuple):
    """Counts as in the object. ``held``: cached tokens and those written to a cache."""

    input: int | None
    output: int | None
    held: int
    reasoning: int
    total: int


def _counts(read: _Object, rules: UsageRules) -> dict[str, int] | None:
    shape = _shape(read.counts)
    cached, reasoning = read.of("cached"), read.of("reasoning")
    written, written_1h = _writes(read)
    inputs = read.counts.get(shape.input)
    if "missed" in read.counts and (inputs or 0) < cached + read.of("missed"):
        if inputs:
            read.doubt(INCONSISTENT)
        inputs = cached + read.of("missed")
    if "tool_prompt" in read.counts:
        inputs = (inputs or 0) + read.of("tool_prompt")
    counts = _Counts(inputs, read.counts.get(shape.output), cached + written, reasoning, read.of("total"))
    if counts[:2] == (None, None) and not (counts.held or reasoning):
        return None
    apart = shape.cache_apart or (shape.input == "input_tokens" and any(read.raw.get(n) is not None for n in _APART))
    beside = shape.reasoning_beside or rules.reasoning_beside
    fitted = _fitted(read, counts, apart, beside, rules.thoughts_in_total)
    if max(fitted) > MAX_NUMBER:
        read.doubt(UNREADABLE)
    inputs, outputs, reasoning = (min(number, MAX_NUMBER) for number in fitted)
    return {
        "input": inputs,
        "output": outputs,
        "cached_input": cached,
        "cache_write": written,
        "cache_write_1h": written_1h,
        "reasoning": reasoning,
    }


def _shape(counts: dict[str, int]) -> _Shape:
    """Return the first shape with a number other than 0, else the first with any number."""
    there = [shape for shape in _SHAPES if shape.input in counts or shape.output in counts]
    reported = (shape for shape in there if counts.get(shape.input) or counts.get(shape.output))
    return next(reported, there[0] if there else _SHAPES[0])


def _writes(read: _Object) -> tuple[int, int]:
    """Return the tokens written to a cache, and how many of them are kept for an hour."""
    reported, long = read.of("written"), read.of("written_1h")
    parts = read.of("written_5m") + long
    if 0 < reported < parts:
        read.doubt(INCONSISTENT)
    return min(max(reported, parts), MAX_NUMBER), long


def _fitted(read: _Object, counts: _Counts, apart: bool, beside: bool, thoughts_in_total: bool) -> tuple[int, int, int]:
    """Return input, output and reasoning that agree with their parts and, if possible, with the total.

    A count may include its parts (cached tokens, reasoning) or not: the reading whose sum is the total is right;
    without one the provider's usual reading is, unless a part is larger than the whole.
    """
    held, total = counts.held, counts.total
    inputs = _readings(counts.input or 0, held, apart)
    outputs = _readings(counts.output or 0, counts.reasoning, beside)
    if total:
        for one in inputs:
            for other in outputs:
                if one + other == total:
                    return one, other, counts.reasoning
        if counts.output is None and total >= inputs[0]:
            return inputs[0], max(total - inputs[0], counts.reasoning), counts.reasoning
        if counts.input is None and total >= outputs[0]:
            return max(total - outputs[0], held), outputs[0], counts.reasoning
    one, other = inputs[0], outputs[0]
    hidden = total - one - other
    if hidden > 0:
        if not thoughts_in_total:
            read.doubt(TOTAL)
        return one, other + hidden, counts.reasoning + hidden
    if total and -hidden not in (held, counts.reasoning, held + counts.reasoning):
        read.doubt(TOTAL)
    return one, other, counts.reasoning


def _readings(count: int, part: int, left_out: bool) -> list[int]:
    """Return the possible values of a count that may include a part or not, the likeliest first."""
    if count < part:
        return [count + part]
    return [count + part, count] if left_out else [count, count + part]


def _cohere(read: _Object) -> dict[str, int] | None:
    """Return the counts of an object with separate processed tokens and billed units."""
    counts = {name: read.of(name) or read.of(f"billed_{name}") for name in ("input", "output")}
    billed = {name: read.of(name) for name in _BILLED if name in read.counts}
    if not read.counts:
        return None
    return {**counts, **billed, "cached_input": read.of("cached")}


def _number(value: object) -> int | None:
    """Return a count: an integer, possibly as text or float; a fraction of a token counts as one."""
    if type(value) is int:
        return value if 0 <= value <= MAX_NUMBER else None
    if isinstance(value, str):
        found = _TEXT.fullmatch(value)
        value = int(found[1]) if found else None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    # compare before rounding: a decimal number with an absurd exponent would be written out in full
    finite = value.is_finite() if isinstance(value, Decimal) else math.isfinite(value)
    return math.ceil(value) if finite and 0 <= value <= MAX_NUMBER else None


def _cost(read: _Object) -> str | None:
    for name in _COSTS:
        value = read.raw.get(name)
        if isinstance(value, dict):
            value = next((value[n] for n in ("total_cost", "total") if value.get(n) is not None), None)
        if value is not None:
            cost = _decimal(value)
            if cost is None:
                read.doubt(UNREADABLE)
            return cost
    return None


def _decimal(value: object) -> str | None:
    """Return a cost as exact decimal text, or ``None`` if it is not a cost."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    try:
        cost = Decimal(str(value).strip())
    except InvalidOperation:
        return None
    # An absurd exponent would be written out in full, so it does not count as a cost.
    if not cost.is_finite() or cost < 0 or abs(cost.adjusted()) > 30 or len(cost.as_tuple().digits) > 40:
        return None
    return f"{abs(cost):f}"


def _kept(read: _Object) -> dict[str, Any] | None:
    """Return the object in a form that the log can store, or ``None`` if that is not possible."""
    try:
        data = _encoder.encode(read.raw)
        if len(data) <= _RAW_LIMIT:
            return msgspec.json.decode(data, type=dict[str, Any])
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    read.doubt(UNREADABLE)
    return None
