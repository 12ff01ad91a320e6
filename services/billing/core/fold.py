"""Fold a generation's events, in log order, into its billing state.

The acceptance rule makes the fold idempotent: repeated events change no token count.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

import msgspec

from schemas.acceptance import BEGINNING, Acceptance, Verdict
from schemas.events import (
    TERMINAL_TYPES,
    AbandonedCall,
    Cancelled,
    Completed,
    Event,
    Failed,
    Interrupted,
    Notice,
    Restarted,
    Started,
    UsageReported,
)
from schemas.subjects import Address
from schemas.usage import Counted, Usage, nested
from services.billing.core.calls import abandon, abandoned_calls, report, sum_reports
from services.billing.core.generation import EXPORT, Generation
from services.billing.core.intake import Record, clip, milliseconds

__all__ = ["Change", "Folded", "fold", "joins_late", "take_export", "take_usage"]

LABELS_LIMIT: Final = 4_000
"""Bound of a generation's labels in characters of JSON; longer ones are dropped altogether."""

Change = Literal["nothing", "progress", "whole"]
"""The write that is needed: none, the position and the running count, or the whole row."""

_DROPPED: Final = {
    Verdict.DUPLICATE: "duplicates",
    Verdict.GAP: "gaps",
    Verdict.ZOMBIE: "zombies",
    Verdict.ENDED: "late",
}


class Folded(NamedTuple):
    """The folded generation (``None`` until an event is accepted), the kind of change, and the number of events by
    verdict.
    """

    generation: Generation | None
    change: Change
    verdicts: Counter[str]


def joins_late(known: Generation | None, records: Iterable[Record], lost: int = 0) -> bool:
    """Return whether `fold` joins the generation behind expired events, and so needs its highest epoch."""
    acceptance = _acceptance(known)
    first = next((record for record in records if record.header is not None), None)
    if first is None or first.header is None:
        return False
    if acceptance.begun:
        return known is not None and known.log_seq <= lost < first.seq
    return acceptance.lacks(first.header)


def fold(
    known: Generation | None, address: Address, records: Iterable[Record], lost: int = 0, highest: int = 0
) -> Folded:
    """Return a copy of ``known`` advanced by ``records``, which belong to one generation and are in log order.

    A generation whose first available event is not its first one has lost its head to the log's age: it is joined if
    possible, and marked ``headless``. The same holds after a loss in the middle: ``lost`` is the last stream sequence
    that expired unread, 0 if none did. ``highest``: the highest epoch in the log, if `joins_late`; events of earlier
    epochs are zombies.
    """
    g = msgspec.structs.replace(known) if known else _unborn(address)
    acceptance = _acceptance(known)
    before = _counted_before(g)
    change: Change = "nothing"
    plain = 0
    verdicts: Counter[str] = Counter()
    for record in records:
        header = record.header
        if header is None:
            verdicts["malformed"] += 1
            continue
        # Join behind expired events, at the beginning or in the middle.
        begun, epoch = acceptance.begun, acceptance.epoch
        if (begun and g.log_seq <= lost < record.seq) or (not begun and acceptance.lacks(header)):
            acceptance.join(highest)  # a takeover may have been lost, even if this event fits
        # Apply the acceptance rule; a dropped event is only counted.
        verdict = acceptance.offer(header, record.seq)
        if verdict is not Verdict.ACCEPTED:
            verdicts[verdict.value] += 1
            if begun:
                # While joining, the last event before the loss remains the last known one.
                _count_drop(g, _DROPPED[verdict], g.log_seq if acceptance.is_joining else record.seq)
                change = "whole"
            continue
        g.log_seq = record.seq
        if header.type == "delta" and begun and acceptance.epoch == epoch and acceptance.joined_at != record.seq:
            # fast path: nearly all events
            plain += 1
            if header.tokens:
                g.counted_output = before + header.tokens
            continue
        # A higher epoch without a terminal abandons the call so far.
        change = "whole"
        if acceptance.epoch > epoch > 0 and header.type not in TERMINAL_TYPES:
            abandon(g, record.event.call if isinstance(record.event, Restarted) else None)
        # Apply the event itself; deltas carry the running count of the last call.
        if not begun or header.type != "delta":
            _apply(g, record, header.type)
        before = _counted_before(g)
        if header.type == "delta" and header.tokens:
            g.counted_output = before + header.tokens
        verdicts[record.fault or "accepted"] += 1
    if plain:
        verdicts["accepted"] += plain
        change = "progress" if change == "nothing" else change
    if acceptance.begun:
        g.epoch, g.next_seq, g.headless = acceptance.epoch, acceptance.next_seq, g.headless or acceptance.headless
    return Folded(g if acceptance.begun else None, change, verdicts)


def _acceptance(known: Generation | None) -> Acceptance:
    return Acceptance(BEGINNING) if known is None else Acceptance(known.position, known.log_seq)


def _counted_before(g: Generation) -> int:
    """Return the output tokens of abandoned calls; the running count of the last call is added to them."""
    return sum(call.counted.output for call in abandoned_calls(g))


def _unborn(address: Address) -> Generation:
    return Generation(
        tenant=address.tenant, session=address.session, generation=address.generation, partition=address.partition
    )


def _count_drop(g: Generation, counter: str, log_seq: int) -> None:
    setattr(g, counter, getattr(g, counter) + 1)
    g.log_seq = log_seq


def _apply(g: Generation, record: Record, type_: str) -> None:
    event = record.event
    if event is not None:
        at = milliseconds(event.at)
        g.started_at = g.started_at or at
        _take(g, event, at)
    elif record.fault:
        _count_drop(g, record.fault, record.seq)
    if type_ in TERMINAL_TYPES:
        g.state = type_
        g.ended_at = g.started_at if event is None else max(milliseconds(event.at), g.started_at)


def _take(g: Generation, event: Event, at: int) -> None:
    match event:
        case Started():
            g.model = clip(event.model)
            _name_upstream(g, event.provider, event.upstream_model)
            _take_count(g, event.counted)
            g.metadata = _labels(event.metadata)
            g.credential = clip(event.key)
        case Restarted():
            _name_upstream(g, event.provider, event.upstream_model)
        case Notice():
            if event.call is not None:
                abandon(g, event.call)
            _name_upstream(g, event.provider or "", event.upstream_model or "")
        case UsageReported() if event.call:
            report(g, _reported_call(event))
        case UsageReported():
            _take_usage(g, event, at)
        case Completed():
            g.code = clip(event.finish_reason)
            _take_count(g, event.counted)
        case Failed():
            g.code = clip(event.code)
            _take_count(g, event.counted)
        case Cancelled() | Interrupted():
            g.code = clip(event.reason)
            _take_count(g, event.counted)


def _name_upstream(g: Generation, provider: str, upstream_model: str) -> None:
    g.provider = clip(provider) or g.provider
    g.upstream_model = clip(upstream_model) or g.upstream_model


def _take_count(g: Generation, counted: Counted) -> None:
    if counted == Counted():
        return  # its writer did not count: the count of its deltas stays
    calls = abandoned_calls(g)
    if counted.input:
        g.counted_input = counted.input + sum(call.counted.input for call in calls)
    if counted.output:
        g.counted_output = counted.output + sum(call.counted.output for call in calls)
    g.counted_exact = counted.exact
    g.encoding = clip(counted.encoding) or g.encoding


def _take_usage(g: Generation, event: UsageReported, at: int) -> None:
    _name_upstream(g, event.provider, event.upstream_model)
    g.upstream_id = clip(event.upstream_id or "") or g.upstream_id
    if g.usage_source == EXPORT:
        return
    g.reported_at = at
    take_usage(g, event.usage, clip(event.source))


def take_usage(g: Generation, usage: Usage, source: str) -> None:
    """Set the provider's report of the last call, and its source."""
    usage = nested(usage)
    g.usage = msgspec.json.encode(usage).decode()
    g.usage_source = source
    sum_reports(g)


def take_export(g: Generation, call: int, usage: Usage) -> None:
    """Apply a row of a provider's export to a call of ``g``; ``call`` 0 is the last one."""
    if call:
        report(g, AbandonedCall(number=call, usage=usage, source=EXPORT))
    else:
        take_usage(g, usage, EXPORT)


def _reported_call(event: UsageReported) -> AbandonedCall:
    return AbandonedCall(
        number=event.call,
        provider=event.provider,
        upstream_model=event.upstream_model,
        upstream_id=event.upstream_id,
        usage=event.usage,
        source=event.source,
    )


def _labels(metadata: dict[str, str]) -> str:
    """Return labels as JSON that any database accepts; empty if they are too long."""
    text = msgspec.json.encode({clip(k): clip(v) for k, v in metadata.items()}, order="sorted").decode()
    return "" if not metadata or len(text) > LABELS_LIMIT else text
