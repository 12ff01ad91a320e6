"""The response shapes of the API."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec

from schemas.events import AbandonedCall
from schemas.usage import Usage
from services.billing.adapters.reports import Totals
from services.billing.core.calls import abandoned_calls, last_call
from services.billing.core.charging import Entry, Line
from services.billing.core.generation import Generation, Pricing, Status
from services.billing.core.money import render

__all__ = [
    "CallUsage",
    "Charge",
    "CountedTokens",
    "Delivered",
    "Drift",
    "Dropped",
    "GenerationTrail",
    "GenerationUsage",
    "LedgerEntry",
    "LedgerLine",
    "ReportedTokens",
    "SessionUsage",
    "UsageReport",
    "UsageRow",
    "entry_view",
    "moment",
    "trail",
    "view",
]


class CountedTokens(msgspec.Struct, kw_only=True):
    """Tailrace's own count; ``exact`` if ``encoding`` is the model's own, otherwise an estimate made with it."""

    input: int
    output: int
    exact: bool
    encoding: str


class ReportedTokens(msgspec.Struct, kw_only=True):
    """The provider's report, normalised: ``input`` includes cached tokens, ``output`` includes reasoning, and
    ``cache_write`` includes ``cache_write_1h``.

    ``cost`` is the provider's own amount in ``currency`` if it reports one; ``raw`` its own object, unchanged.
    """

    input: int
    output: int
    cached_input: int
    cache_write: int
    cache_write_1h: int
    reasoning: int
    billed_input: int | None
    billed_output: int | None
    cost: str | None
    currency: str | None
    raw: dict[str, Any] | None


class CallUsage(msgspec.Struct, kw_only=True):
    """One call that did not become the answer: its own count, and its provider's report.

    ``number`` counts a generation's calls; ``code``: why it was abandoned. ``estimated``: its provider has not reported
    its final usage, so the numbers are ours.
    """

    number: int
    code: str
    provider: str
    upstream_model: str
    upstream_id: str | None
    counted: CountedTokens
    reported: ReportedTokens | None
    usage_source: str
    drift: "Drift | None"
    estimated: bool


class Drift(msgspec.Struct, kw_only=True):
    """Reported minus counted tokens; ``input`` is null if input was not counted."""

    input: int | None
    output: int | None


class Delivered(msgspec.Struct, kw_only=True):
    """Delivery to subscribers, as far as delivery has reported.

    ``tokens``: those of the furthest subscriber; events and bytes are sums over all subscribers.
    """

    subscribers: int
    events: int
    tokens: int
    bytes: int


class Charge(msgspec.Struct, kw_only=True):
    """Its cost: the sum of its entries in the ledger. ``status``: ``unpriced`` while no price is known for it,
    ``waived`` by the tenant's policy, ``pending`` before it has settled. ``tokens``: of all calls, as they were priced.
    """

    status: Pricing
    amount: str
    currency: str | None
    entries: int
    tokens: int


class Dropped(msgspec.Struct, kw_only=True):
    """Events of the generation that the acceptance rule dropped, and accepted ones that could not be decoded."""

    duplicates: int
    gaps: int
    zombies: int
    late: int
    unknown: int
    malformed: int


class GenerationUsage(msgspec.Struct, kw_only=True):
    """Billing's numbers of one generation. Times in RFC 3339, UTC.

    ``state``: ``running``, or how it ended. ``status``: how counted and reported compare. ``counted`` runs while the
    generation streams; ``reported`` is null until the provider has reported its usage. Both are those of its last call;
    ``abandoned_calls`` holds the earlier ones. ``settles_at``: when billing stops waiting for a report.
    """

    generation: str
    session: str
    tenant: str
    model: str
    provider: str
    upstream_model: str
    state: str
    status: Status
    code: str
    started_at: str | None
    ended_at: str | None
    settles_at: str | None
    counted: CountedTokens
    reported: ReportedTokens | None
    reported_at: str | None
    usage_source: str
    drift: Drift | None
    abandoned_calls: list[CallUsage]
    reasons: list[str]
    delivered: Delivered | None
    charge: Charge
    metadata: dict[str, str]
    dropped: Dropped
    headless: bool


class LedgerLine(msgspec.Struct, kw_only=True, rename={"class_": "class"}):
    """One token class of a bill: its count, its row of the price book, and its amount.

    ``call``: the number of the abandoned call that used them; 0 for the last call.
    """

    class_: str
    count: int
    price: int
    rate: str
    amount: str
    call: int


class LedgerEntry(msgspec.Struct, kw_only=True):
    """One amount. ``source``: the source of the numbers; ``rule``: why they apply; ``revision``: of the price book.

    ``lines``: the bill that the generation's entries sum to.
    """

    session: str
    generation: str
    number: int
    kind: str
    amount: str
    currency: str
    source: str
    rule: str
    lines: list[LedgerLine]
    revision: int
    created_at: str


class GenerationTrail(GenerationUsage, kw_only=True):
    """All numbers of one generation, and every ledger entry that follows from them.

    ``events``: how many of its events were accepted.
    """

    events: int
    entries: list[LedgerEntry]


class SessionUsage(msgspec.Struct, kw_only=True):
    """Sums over a session and a page of its generations; ``next`` is the cursor of the next page."""

    session: str
    tenant: str
    totals: Totals
    generations: list[GenerationUsage]
    next: str | None


class UsageRow(msgspec.Struct, kw_only=True):
    """Sums of one group; ``key`` holds its value for each dimension of ``group_by``."""

    key: dict[str, str]
    totals: Totals


class UsageReport(msgspec.Struct, kw_only=True):
    """Sums by group, in the order of their keys; ``next`` is the cursor of the next page."""

    group_by: list[str]
    rows: list[UsageRow]
    next: str | None


def view(g: Generation) -> GenerationUsage:
    """Convert a generation to its response shape."""
    last = last_call(g)
    return GenerationUsage(
        generation=g.generation,
        session=g.session,
        tenant=g.tenant,
        model=g.model,
        provider=g.provider,
        upstream_model=g.upstream_model,
        state=g.state,
        status=g.status,
        code=g.code,
        started_at=moment(g.started_at or None),
        ended_at=moment(g.ended_at),
        settles_at=moment(g.settle_at),
        counted=CountedTokens(
            input=last.counted_input, output=last.counted_output, exact=g.counted_exact, encoding=g.encoding
        ),
        reported=_reported(g.usage),
        reported_at=moment(g.reported_at),
        usage_source=g.usage_source,
        drift=None
        if g.drift_input is None and g.drift_output is None
        else Drift(input=g.drift_input, output=g.drift_output),
        abandoned_calls=[_call(call) for call in abandoned_calls(g)],
        reasons=g.reasons.split(",") if g.reasons else [],
        delivered=_delivered(g),
        charge=Charge(
            status=g.pricing,
            amount=render(g.amount),
            currency=g.currency or None,
            entries=g.entries,
            tokens=g.tokens,
        ),
        metadata=msgspec.json.decode(g.metadata) if g.metadata else {},
        dropped=Dropped(
            duplicates=g.duplicates,
            gaps=g.gaps,
            zombies=g.zombies,
            late=g.late,
            unknown=g.unknown,
            malformed=g.malformed,
        ),
        headless=g.headless,
    )


def entry_view(entry: Entry) -> LedgerEntry:
    """Convert an entry to its response shape."""
    lines = msgspec.json.decode(entry.lines, type=list[Line])
    return LedgerEntry(
        session=entry.session,
        generation=entry.generation,
        number=entry.number,
        kind=entry.kind,
        amount=render(entry.amount),
        currency=entry.currency,
        source=entry.source,
        rule=entry.rule,
        lines=[
            LedgerLine(
                class_=line.token_class,
                count=line.count,
                price=line.price,
                rate=line.rate,
                amount=line.amount,
                call=line.call,
            )
            for line in lines
        ],
        revision=entry.revision,
        created_at=moment(entry.created_at) or "",
    )


def trail(g: Generation, entries: Iterable[Entry]) -> GenerationTrail:
    """Convert a generation and its entries to their response shape."""
    usage = view(g)
    shown = {name: getattr(usage, name) for name in usage.__struct_fields__}
    return GenerationTrail(**shown, events=g.next_seq, entries=[entry_view(e) for e in entries])


def _call(call: AbandonedCall) -> CallUsage:
    counted, usage = call.counted, call.usage
    drift = None
    if usage is not None:
        drift = Drift(
            input=usage.input - counted.input if counted.input else None, output=usage.output - counted.output
        )
    return CallUsage(
        number=call.number,
        code=call.code,
        provider=call.provider,
        upstream_model=call.upstream_model,
        upstream_id=call.upstream_id,
        counted=CountedTokens(**msgspec.structs.asdict(counted)),
        reported=None if usage is None else _tokens(usage),
        usage_source=call.source,
        drift=drift,
        estimated=usage is None or call.source == "begun",
    )


def _delivered(g: Generation) -> Delivered | None:
    if g.subscribers is None:
        return None
    return Delivered(
        subscribers=g.subscribers,
        events=g.delivered_events or 0,
        tokens=g.delivered_tokens or 0,
        bytes=g.delivered_bytes or 0,
    )


def _reported(usage: str | None) -> ReportedTokens | None:
    if usage is None:
        return None
    report = msgspec.json.decode(usage, type=Usage)
    return _tokens(report)


def _tokens(report: Usage) -> ReportedTokens:
    return ReportedTokens(**{name: getattr(report, name) for name in ReportedTokens.__struct_fields__})


def moment(milliseconds: int | None) -> str | None:
    """Format milliseconds since 1970 as RFC 3339, UTC."""
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
