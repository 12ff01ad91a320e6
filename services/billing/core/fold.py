"""The fold: a generation's events, in the order of the log, into what billing knows of it.

The acceptance rule makes it idempotent: events that were folded before change no number again.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

import msgspec

from schemas.acceptance import BEGINNING, Position, Verdict, joining, judge
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

__all__ = ["Change", "Folded", "fold", "take_export", "take_usage"]

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


def fold(known: Generation | None, address: Address, records: Iterable[Record], lost: int = 0) -> Folded:
    """Return ``known`` advanced by ``records``, which are of one generation and in the order of the log.

    ``known`` itself is left alone. A generation whose first known event is not its first has lost its head to the
    log's age: it is joined where it can be, and marked. So is one whose middle was lost: ``lost`` is the last stream
    sequence that had expired unread, 0 where none had.
    """
    g = msgspec.structs.replace(known) if known else _unborn(address)
    epoch, next_seq, ended = g.position if known else BEGINNING
    before = _counted_before(g)
    change: Change = "nothing"
    plain = 0
    verdicts: Counter[str] = Counter()
    for record in records:
        header = record.header
        if header is None:
            verdicts["malformed"] += 1
            continue
        if header.seq == next_seq and header.epoch == epoch and header.type == "delta" and not ended:
            # The rule's plain case, and nearly all of the log: asking it would cost more than all else here.
            next_seq += 1
            plain += 1
            if header.tokens:
                g.counted_output = before + header.tokens
            g.log_seq = record.seq
            continue
        position = Position(epoch, next_seq, ended)
        after, verdict = judge(position, header.type, header.epoch, header.seq)
        if verdict is Verdict.GAP and (position == BEGINNING or g.log_seq <= lost < record.seq):
            after, verdict = judge(joining(header.epoch, header.seq), header.type, header.epoch, header.seq)
            g.headless = True
        if verdict is not Verdict.ACCEPTED:
            verdicts[verdict.value] += 1
            if position != BEGINNING:
                _count_drop(g, _DROPPED[verdict], record.seq)
                change = "whole"
            continue
        change = "whole"
        if after.epoch > epoch > 0 and header.type not in TERMINAL_TYPES:
            abandon(g, record.event.call if isinstance(record.event, Restarted) else None)
        if position == BEGINNING or header.type != "delta":
            _apply(g, record, header.type)
        before = _counted_before(g)
        if header.type == "delta" and header.tokens:
            g.counted_output = before + header.tokens
        epoch, next_seq, ended = after.epoch, after.next_seq, ended or after.ended
        g.log_seq = record.seq
        verdicts[record.fault or "accepted"] += 1
    if plain:
        verdicts["accepted"] += plain
        change = "progress" if change == "nothing" else change
    g.epoch, g.next_seq = epoch, next_seq
    return Folded(g if epoch else None, change, verdicts)


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
