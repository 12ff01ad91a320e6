"""The calls of a generation: abandoned ones, and the last one.

The counted and reported numbers of a generation are sums over all of its calls. ``calls`` holds the abandoned ones; the
difference belongs to the last call. Each call is compared and priced separately.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from schemas.events import AbandonedCall
from schemas.usage import Counted, Usage, nested
from services.billing.core.generation import EXPORT, Generation
from services.billing.core.intake import clip

__all__ = ["LIMIT", "abandon", "abandoned_calls", "forget_events", "last_call", "report", "sum_reports"]

LIMIT: Final = 256
"""Bound of abandoned calls kept separately; further ones are added to the last of them."""
REPORTED: Final = ("input", "output", "cached_input", "cache_write", "cache_write_1h", "reasoning")
"""Token classes that a provider reports, which are also the columns of their sums."""
_decoder: Final = msgspec.json.Decoder(list[AbandonedCall])


def abandoned_calls(g: Generation) -> Sequence[AbandonedCall]:
    """Return the abandoned calls of ``g``, in order."""
    return _decoder.decode(g.calls) if g.calls else ()


def last_call(g: Generation) -> Generation:
    """Return ``g`` with the numbers of its last call only, running or ended."""
    if not g.calls:
        return g
    calls = abandoned_calls(g)
    usage = _usage(g)
    reported = {name: None if usage is None else getattr(usage, name) for name in REPORTED}
    return msgspec.structs.replace(
        g,
        counted_input=g.counted_input - sum(c.counted.input for c in calls),
        counted_output=g.counted_output - sum(c.counted.output for c in calls),
        calls="",
        **reported,
    )


def abandon(g: Generation, call: AbandonedCall | None) -> None:
    """Append the abandoned call to ``g`` and start the numbers of the next call.

    ``None``: the producer sent no record of the call, so the running count in the log is used.
    """
    calls = list(abandoned_calls(g))
    known = last_call(g)
    reported = _usage(g) if g.usage_source != EXPORT else None
    if call is None:
        if not known.counted_output and reported is None:
            return
        call = _lost(known, max((c.number for c in calls), default=0) + 1)
    if reported is not None:
        if call.usage is None:
            upstream_id = call.upstream_id or g.upstream_id or None
            call = msgspec.structs.replace(call, usage=reported, source=g.usage_source, upstream_id=upstream_id)
        g.usage, g.usage_source, g.reported_at = None, "", None
    g.upstream_id = ""
    _set(g, _with(calls, _bare(call)), Counted(input=known.counted_input))


def report(g: Generation, reported: AbandonedCall) -> None:
    """Set the provider's report of an abandoned call; its other fields stay if the call is known.

    An export takes precedence over the log. An unknown call was lost with the head of the log.
    """
    calls = list(abandoned_calls(g))
    known = next((call for call in calls if call.number == reported.number), None)
    if known is not None and known.source == EXPORT and reported.source != EXPORT:
        return
    call = reported if known is None else msgspec.structs.replace(known, usage=reported.usage, source=reported.source)
    calls = [c for c in calls if c.number != reported.number]
    last = last_call(g)
    numbered = sorted([*calls, _bare(call)], key=lambda c: c.number)
    _set(g, numbered, Counted(input=last.counted_input, output=last.counted_output))


def forget_events(g: Generation) -> None:
    """Remove the calls of ``g`` that events reported; reports of exports stay."""
    kept = [
        AbandonedCall(number=c.number, upstream_id=c.upstream_id, usage=c.usage, source=c.source)
        for c in abandoned_calls(g)
        if c.source == EXPORT
    ]
    if g.usage_source != EXPORT:
        g.usage, g.usage_source, g.reported_at = None, "", None
    _set(g, kept, Counted())


def sum_reports(g: Generation) -> None:
    """Set the reported numbers of ``g`` to the sums over the reports of all its calls."""
    last = _usage(g)
    reported = [usage for usage in (last, *(c.usage for c in abandoned_calls(g))) if usage is not None]
    for name in REPORTED:
        setattr(g, name, sum(getattr(usage, name) for usage in reported) if reported else None)


def _with(calls: Sequence[AbandonedCall], call: AbandonedCall) -> list[AbandonedCall]:
    """Return ``calls`` with ``call`` merged in; the report of an export that is already there stays."""
    kept = []
    for other in calls:
        if other.number != call.number:
            kept.append(other)
        elif other.source == EXPORT:
            call = msgspec.structs.replace(call, usage=other.usage, source=other.source)
    return sorted([*kept, call], key=lambda c: c.number)


def _set(g: Generation, calls: Sequence[AbandonedCall], last: Counted) -> None:
    """Set the calls, their sums, and the counted tokens of the last call."""
    kept = _bounded(calls)
    g.calls = msgspec.json.encode(kept).decode() if kept else ""
    g.counted_input = last.input + sum(c.counted.input for c in kept)
    g.counted_output = last.output + sum(c.counted.output for c in kept)
    sum_reports(g)


def _usage(g: Generation) -> Usage | None:
    return None if g.usage is None else msgspec.json.decode(g.usage, type=Usage)


def _lost(known: Generation, number: int) -> AbandonedCall:
    counted = Counted(input=known.counted_input, output=known.counted_output, encoding=known.encoding)
    return AbandonedCall(
        number=number,
        code="producer_lost",
        provider=known.provider,
        upstream_model=known.upstream_model,
        counted=counted,
    )


def _bare(call: AbandonedCall) -> AbandonedCall:
    """Return a call with texts clipped to fit, and without the provider's raw usage object, which stays in the log."""
    return msgspec.structs.replace(
        call,
        code=clip(call.code),
        provider=clip(call.provider),
        upstream_model=clip(call.upstream_model),
        upstream_id=None if call.upstream_id is None else clip(call.upstream_id),
        counted=msgspec.structs.replace(call.counted, encoding=clip(call.counted.encoding)),
        usage=None if call.usage is None else msgspec.structs.replace(nested(call.usage), raw=None),
        source=clip(call.source),
    )


def _bounded(calls: Sequence[AbandonedCall]) -> list[AbandonedCall]:
    kept = list(calls[:LIMIT])
    for call in calls[LIMIT:]:
        kept[-1] = _joined(kept[-1], call)
    return kept


def _joined(one: AbandonedCall, other: AbandonedCall) -> AbandonedCall:
    counted = msgspec.structs.replace(
        one.counted,
        input=one.counted.input + other.counted.input,
        output=one.counted.output + other.counted.output,
    )
    reported = [usage for usage in (one.usage, other.usage) if usage is not None]
    usage = Usage(**{name: sum(getattr(u, name) for u in reported) for name in REPORTED}) if reported else None
    return msgspec.structs.replace(one, counted=counted, usage=usage, code="several")
