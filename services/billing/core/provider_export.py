"""Parse a provider's billing export, row by row, into normalised usage.

Column names differ by provider: those of OpenAI, OpenRouter, Anthropic and Cohere are accepted, flat or nested as in
their usage objects, beside our own. With Anthropic's cache columns, ``input_tokens`` excludes cached tokens.
"""

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Final, NamedTuple

import msgspec

from schemas.names import InvalidName, check_name
from schemas.usage import MAX_NUMBER, Usage, nested
from services.billing.core.intake import clip

__all__ = ["MOST_ROWS", "BadExport", "ExportFault", "ExportRow", "parse_export"]

MOST_ROWS: Final = 100_000
_IDENTITIES: Final = {
    "generation": ("generation",),
    "upstream_id": ("upstream_id", "generation_id", "request_id", "response_id", "message_id", "id"),
    "provider": ("provider",),
}
_COUNTS: Final = {
    "input": ("input", "native_tokens_prompt", "tokens_prompt", "prompt_tokens", "input_tokens"),
    "output": ("output", "native_tokens_completion", "tokens_completion", "completion_tokens", "output_tokens"),
    "cached_input": (
        "cached_input",
        "native_tokens_cached",
        "tokens_cached",
        "cached_tokens",
        "input_cached_tokens",
        "cache_read_input_tokens",
        "prompt_cache_hit_tokens",
    ),
    "cache_write": ("cache_write", "cache_write_tokens", "cache_creation_input_tokens"),
    "cache_write_5m": ("ephemeral_5m_input_tokens", "cache_creation_ephemeral_5m_input_tokens"),
    "cache_write_1h": (
        "cache_write_1h",
        "ephemeral_1h_input_tokens",
        "cache_creation_ephemeral_1h_input_tokens",
    ),
    "reasoning": ("reasoning", "native_tokens_reasoning", "tokens_reasoning", "reasoning_tokens"),
    "billed_input": ("billed_input", "billed_units.input_tokens"),
    "billed_output": ("billed_output", "billed_units.output_tokens"),
}
_COSTS: Final = ("cost", "total_cost", "cost_total")
_EXCLUDED: Final = ("cache_read_input_tokens", "cache_creation_input_tokens", *_COUNTS["cache_write_5m"])


class ExportRow(NamedTuple):
    """The provider's usage of one generation, by our name or the provider's; ``digest`` identifies repeated rows."""

    generation: str
    upstream_id: str
    provider: str
    usage: Usage
    digest: str


class ExportFault(NamedTuple):
    """One fault; ``row`` counts from 1, without the header."""

    row: int
    message: str


class BadExport(ValueError):
    """An export with faults: carries all of them."""

    def __init__(self, faults: Sequence[ExportFault]) -> None:
        self.faults = list(faults)
        super().__init__("the export is not usable:\n" + "\n".join(f"  row {f.row}: {f.message}" for f in self.faults))


def parse_export(kind: str, data: bytes, provider: str = "") -> list[ExportRow]:
    """Parse an export: ``json`` (a list, or an object with ``rows`` or ``data``) or ``csv``.

    ``provider`` is the default for rows that name none.

    Raises:
        BadExport: it has faults; all of them.
    """
    rows: list[ExportRow] = []
    faults: list[ExportFault] = []
    for number, record in enumerate(_csv(data) if kind == "csv" else _json(data), 1):
        if number > MOST_ROWS:
            raise BadExport([ExportFault(number, f"more than {MOST_ROWS} rows: send it in parts")])
        try:
            rows.append(_row(record, provider))
        except ValueError as error:
            faults.append(ExportFault(number, str(error)))
    if faults:
        raise BadExport(faults)
    return rows


def _csv(data: bytes) -> Iterator[Mapping[str, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")), restkey="", strict=True)
        for number, record in enumerate(reader, 1):
            if "" in record or None in record.values():
                raise BadExport([ExportFault(number, "the row and the header have different numbers of cells")])
            yield record
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadExport([ExportFault(1, f"not valid CSV: {error}")]) from error


def _json(data: bytes) -> Iterable[Mapping[str, Any]]:
    try:
        document = msgspec.json.decode(data)
        if isinstance(document, dict):
            document = document.get("rows", document.get("data"))
        return msgspec.convert(document, list[dict[str, Any]])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadExport([ExportFault(1, f"not a JSON list of objects: {error}")]) from error


def _row(record: Mapping[str, Any], provider: str) -> ExportRow:
    flat = dict(_flatten(record))
    names = {role: _first(flat, columns) for role, columns in _IDENTITIES.items()}
    generation, upstream_id = str(names["generation"] or ""), clip(str(names["upstream_id"] or ""))
    if not generation and not upstream_id:
        raise ValueError(
            f"it names neither a generation nor the provider's id ({', '.join(_IDENTITIES['upstream_id'])})"
        )
    if generation:
        try:
            check_name("generation", generation)
        except InvalidName as error:
            raise ValueError(str(error)) from error
    usage = _usage(flat, record)
    named = clip(str(names["provider"] or provider))
    bare = msgspec.structs.replace(usage, raw=None)
    digest = hashlib.sha256(msgspec.json.encode([named, generation, upstream_id, bare])).hexdigest()
    return ExportRow(generation, upstream_id, named, usage, digest)


def _flatten(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield leaves by their own names; those of Cohere's billed units by both names."""
    for name, value in record.items():
        key = str(name).strip().lower()
        if not isinstance(value, Mapping):
            yield key, value
            continue
        for inner, leaf in _flatten(value):
            yield (f"billed_units.{inner}" if key == "billed_units" else inner), leaf


def _first(flat: Mapping[str, Any], columns: Iterable[str]) -> Any:
    return next((flat[c] for c in columns if flat.get(c) not in (None, "")), None)


def _usage(flat: Mapping[str, Any], record: Mapping[str, Any]) -> Usage:
    counts = {name: _count(name, _first(flat, columns)) for name, columns in _COUNTS.items()}
    for name in ("input", "output"):
        counts[name] = counts[name] if counts[name] is not None else counts[f"billed_{name}"]
        if counts[name] is None:
            raise ValueError(f"it has no number of {name} tokens ({', '.join(_COUNTS[name])})")
    counts["cache_write"] = max(
        counts["cache_write"] or 0, (counts["cache_write_5m"] or 0) + (counts["cache_write_1h"] or 0)
    )
    if any(flat.get(column) not in (None, "") for column in _EXCLUDED) and flat.get("input") in (None, ""):
        counts["input"] = (counts["input"] or 0) + (counts["cached_input"] or 0) + (counts["cache_write"] or 0)
    cost = _cost(_first(flat, _COSTS))
    usage = Usage(
        input=counts["input"] or 0,
        output=counts["output"] or 0,
        cached_input=counts["cached_input"] or 0,
        cache_write=counts["cache_write"] or 0,
        cache_write_1h=counts["cache_write_1h"] or 0,
        reasoning=counts["reasoning"] or 0,
        billed_input=counts["billed_input"],
        billed_output=counts["billed_output"],
        cost=cost,
        currency=None if cost is None else str(flat.get("currency") or "USD")[:3].upper(),
        raw=dict(record),
    )
    return nested(usage)


def _count(name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        number = Decimal(str(value).strip())
        if isinstance(value, bool) or number != number.to_integral_value() or not 0 <= number <= MAX_NUMBER:
            raise ValueError("not whole")
    except (InvalidOperation, ValueError) as error:
        raise ValueError(f"{name}: {str(value)[:40]!r} is not a whole number of tokens") from error
    return int(number)


def _cost(value: Any) -> str | None:
    if value is None:
        return None
    try:
        cost = Decimal(str(value).strip())
    except InvalidOperation as error:
        raise ValueError(f"cost: {str(value)[:40]!r} is not a decimal number") from error
    if not cost.is_finite() or cost < 0:
        raise ValueError(f"cost: {str(value)[:40]!r} is not a decimal number of zero or more")
    return f"{cost:f}"[:40]
