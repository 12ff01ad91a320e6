"""The fold: a generation's events, in the order of the log, into what billing knows of it.

The acceptance rule makes it idempotent: events that were folded before change no number again.
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
"""Characters of a generation's labels that are kept, as JSON; more than that and none are."""

Change = Literal["nothing", "progress", "whole"]
"""What must be written: nothing, the position and the running count, or the whole row."""

_DROPPED: Final = {
    Verdict.DUPLICATE: "duplicates",
    Verdict.GAP: "gaps",
    Verdict.ZOMBIE: "zombies",
    Verdict.ENDED: "late",
}


class Folded(NamedTuple):
    """The generation after its records (``None`` while none was accepted), what changed, and the verdicts."""

    generation: Generation | None
    change: Change
    verdicts: Counter[str]


def joins_late(known: Generation | None, records: Iterable[Record], lost: int = 0) -> bool:
    """Tell whether `fold` joins the generation behind events that have expired: it needs the highest epoch then."""
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
    """Return ``known`` advanced by ``records``, which are of one generation and in the order of the log.

    ``known`` itself is left alone. A generation whose first known event is not its first has lost its head to the
    log's age: it is joined where it can be, and marked. So is one whose middle was lost: ``lost`` is the last stream
    sequence that had expired unread, 0 where none had. ``highest``: the highest epoch that the log keeps of it, where
    `joins_late`; what an earlier epoch wrote there is a zombie's.
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
        begun, epoch = acceptance.begun, acceptance.epoch
        if (begun and g.log_seq <= lost < record.seq) or (not begun and acceptance.lacks(header)):
            acceptance.join(highest)  # what was lost may hold a takeover, also where this event would fit
        verdict = acceptance.offer(header, record.seq)
        if verdict is not Verdict.ACCEPTED:
            verdicts[verdict.value] += 1
            if begun:
                # While it is being joined, the last event before the loss stays the last one that is known.
                _count_drop(g, _DROPPED[verdict], g.log_seq if acceptance.is_joining else record.seq)
                change = "whole"
            continue
        g.log_seq = record.seq
        if header.type == "delta" and begun and acceptance.epoch == epoch and acceptance.joined_at != record.seq:
            # nearly all of the log
            plain += 1
            if header.tokens:
                g.counted_output = before + header.tokens
            continue
        change = "whole"
        if acceptance.epoch > epoch > 0 and header.type not in TERMINAL_TYPES:
            abandon(g, record.event.call if isinstance(record.event, Restarted) else None)
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
    """Return the output tokens of abandoned calls, to which the running count of the last one is added."""
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
            report(g, _told(event))
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
        return  # its writer did not count: what deltas said stays
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
    """Set what the provider reported of the last call, and who told so."""
    usage = nested(usage)
    g.usage = msgspec.json.encode(usage).decode()
    g.usage_source = source
    sum_reports(g)


def take_export(g: Generation, call: int, usage: Usage) -> None:
    """Set what a provider's export says of a call of ``g``; ``call`` 0 is the one that it ended with."""
    if call:
        report(g, AbandonedCall(number=call, usage=usage, source=EXPORT))
    else:
        take_usage(g, usage, EXPORT)


def _told(event: UsageReported) -> AbandonedCall:
    return AbandonedCall(
        number=event.call,
        provider=event.provider,
        upstream_model=event.upstream_model,
        upstream_id=event.upstream_id,
        usage=event.usage,
        source=event.source,
    )


def _labels(metadata: dict[str, str]) -> str:
    """Return labels as JSON that any database takes; none that are too many or too long."""
    text = msgspec.json.encode({clip(k): clip(v) for k, v in metadata.items()}, order="sorted").decode()
    return "" if not metadata or len(text) > LABELS_LIMIT else text
