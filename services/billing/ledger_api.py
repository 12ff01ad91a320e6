"""The HTTP API: ledger entries, and generations by the outcome of their reconciliation."""

from typing import Annotated, Any, Final

import msgspec
from litestar import Request, Response, get
from litestar.datastructures import State
from litestar.openapi.spec import Example
from litestar.params import QueryParameter

from schemas.usage import COUNTS
from services.billing.adapters.entries import Entries
from services.billing.adapters.reports import Reports
from services.billing.core.charging import Entry
from services.billing.core.question import (
    BadQuestion,
    Filters,
    parse_label,
    parse_moment,
    parse_page,
    parse_status,
    write_page,
)
from services.billing.responses import PROBLEMS, answer, only
from services.billing.views import GenerationUsage, LedgerEntry, entry_view, view
from services.kit.auth.guards import caller, needs
from services.kit.auth.principal import Principal
from services.kit.problem import Problem

__all__ = ["ENTRY_COLUMNS", "entry_rows", "ledger", "reconciliations"]

DEFAULT_LIMIT: Final = 100
Text = Annotated[str | None, QueryParameter(max_length=200, pattern=r"^[^\x00]*$")]
Limit = Annotated[int, QueryParameter(ge=1, le=1_000, description="Maximum number of rows in a page")]
Cursor = Annotated[str | None, QueryParameter(max_length=2_000, description="`next` of the previous page")]
From = Annotated[
    str | None, QueryParameter(name="from", description="Inclusive", examples=[Example(value="2026-01-31")])
]
To = Annotated[str | None, QueryParameter(description="Exclusive", examples=[Example(value="2026-02-01")])]
_KINDS: Final = ("charge", "correction", "reversal")


class LedgerPage(msgspec.Struct, kw_only=True):
    """Entries, the oldest first; ``next`` is the cursor of the next page."""

    entries: list[LedgerEntry]
    next: str | None


class ReconciliationPage(msgspec.Struct, kw_only=True):
    """Generations in the order of their start; ``next`` is the cursor of the next page."""

    generations: list[GenerationUsage]
    next: str | None


ENTRY_COLUMNS: Final = (
    "created_at",
    "session",
    "generation",
    "number",
    "kind",
    "amount",
    "currency",
    "source",
    "rule",
    "revision",
)


@get(
    "/v1/ledger",
    summary="Entries of the ledger",
    operation_id="ledger",
    tags=["money"],
    responses=PROBLEMS,
    **needs("usage"),
)
async def ledger(
    *,
    request: Request[Any, Any, Any],
    state: State,
    from_: From = None,
    to: To = None,
    session: Text = None,
    generation: Text = None,
    kind: Text = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Response[LedgerPage]:
    """Every amount, with the numbers and prices behind it. Entries never change: an error is corrected by another
    entry.
    """
    only(request, ("from", "to", "session", "generation", "kind", "limit", "cursor"))
    principal = caller(request)
    _reach(principal, session)
    if kind is not None and kind not in _KINDS:
        raise BadQuestion(f"kind: {kind[:40]!r} is not one of {', '.join(_KINDS)}")
    start, end = _span(from_, to)
    exact = [(n, v) for n, v in (("session", session), ("generation", generation), ("kind", kind)) if v is not None]
    question = (principal.tenant, start, end, exact)
    after = parse_page(question, cursor, (int, str, str, int))
    entries: Entries = state.entries
    found = await entries.listed(principal.tenant, start, end, exact, after, limit + 1)
    following = write_page(question, _key(found[limit - 1])) if len(found) > limit else None
    page = LedgerPage(entries=[entry_view(e) for e in found[:limit]], next=following)
    return answer(request, page, ENTRY_COLUMNS, entry_rows, following)


def _key(entry: Entry) -> tuple[str | int, ...]:
    return entry.created_at, entry.session, entry.generation, entry.number


def entry_rows(page: Any) -> Any:
    """Return the CSV rows of a page with ``entries``."""
    return ([getattr(entry, name) for name in ENTRY_COLUMNS] for entry in page.entries)


_COLUMNS: Final = (
    "started_at",
    "session",
    "generation",
    "model",
    "provider",
    "state",
    "status",
    "code",
    "counted_input",
    "counted_output",
    "input",
    "output",
    "cached_input",
    "cache_write",
    "cache_write_1h",
    "reasoning",
    "drift_input",
    "drift_output",
    "reasons",
    "delivered_tokens",
    "charge",
    "amount",
    "currency",
)


@get(
    "/v1/reconciliations",
    summary="Generations by how they were reconciled",
    operation_id="reconciliations",
    tags=["usage"],
    responses=PROBLEMS,
    **needs("usage"),
)
async def reconciliations(
    *,
    request: Request[Any, Any, Any],
    state: State,
    status: Text = None,
    pricing: Text = None,
    from_: From = None,
    to: To = None,
    session: Text = None,
    model: Text = None,
    provider: Text = None,
    key: Text = None,
    label: Text = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Response[ReconciliationPage]:
    """Counted, reported and delivered numbers of each generation, and the reasons for differences."""
    names = ("status", "pricing", "from", "to", "session", "model", "provider", "key", "label", "limit", "cursor")
    only(request, names)
    principal = caller(request)
    _reach(principal, session)
    start, end = _span(from_, to)
    filters = Filters(
        start=start,
        end=end,
        tenant=principal.tenant,
        model=model,
        provider=provider,
        status=parse_status(status),
        session=session,
        key=key,
        pricing=_pricing(pricing),
        label=parse_label(label),
    )
    after = parse_page(filters, cursor, (int, str))
    reports: Reports = state.reports
    found = await reports.generations(filters, after, limit + 1)
    last = found[limit - 1] if len(found) > limit else None
    following = write_page(filters, (last.started_at, last.generation)) if last else None
    page = ReconciliationPage(generations=[view(g) for g in found[:limit]], next=following)
    return answer(request, page, _COLUMNS, _rows, following)


def _rows(page: ReconciliationPage) -> Any:
    for g in page.generations:
        reported, drift = g.reported, g.drift
        yield (
            g.started_at,
            g.session,
            g.generation,
            g.model,
            g.provider,
            g.state,
            g.status,
            g.code,
            g.counted.input,
            g.counted.output,
            *([getattr(reported, name) for name in COUNTS] if reported else [""] * len(COUNTS)),
            *((drift.input, drift.output) if drift else ("", "")),
            " ".join(g.reasons),
            g.delivered.tokens if g.delivered else "",
            g.charge.status,
            g.charge.amount,
            g.charge.currency,
        )


def _pricing(text: str | None) -> str | None:
    allowed = ("pending", "charged", "unpriced", "waived")
    if text is not None and text not in allowed:
        raise BadQuestion(f"pricing: {text[:40]!r} is not one of {', '.join(allowed)}")
    return text


def _span(from_: str | None, to: str | None) -> tuple[int | None, int | None]:
    start, end = parse_moment("from", from_), parse_moment("to", to)
    if start is not None and end is not None and start >= end:
        raise BadQuestion("to: it must be after from")
    return start, end


def _reach(principal: Principal, session: str | None) -> None:
    if session is None and not principal.reaches_all:
        raise Problem(403, "the credentials reach only some sessions: ask with session=")
    if session is not None and not principal.reaches(session):
        raise Problem(404, f"billing has seen no session {session!r}")
