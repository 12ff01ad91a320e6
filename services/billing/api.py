"""The HTTP API: usage queries."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
from litestar import Litestar, Request, Response, Router, get
from litestar.datastructures import State
from litestar.openapi.spec import Example
from litestar.params import PathParameter, QueryParameter

from schemas.names import InvalidName, check_name
from services.billing.adapters.budgets import Budgets
from services.billing.adapters.entries import Entries
from services.billing.adapters.imports import Imports
from services.billing.adapters.prices import Prices
from services.billing.adapters.reports import Reports, Totals
from services.billing.admission import Admission
from services.billing.budgets_api import delete_budget, list_budgets, put_budget, show_budget
from services.billing.core.question import (
    BUCKETS,
    BadQuestion,
    Filters,
    PageKey,
    parse_group_by,
    parse_label,
    parse_moment,
    parse_page,
    parse_status,
    render_bucket,
    write_page,
)
from services.billing.errors import LedgerUnavailable, LedgerUnusable
from services.billing.ledger_api import ENTRY_COLUMNS, entry_rows, ledger, reconciliations
from services.billing.live import Live, live_usage
from services.billing.money_api import put_prices, put_usage, show_prices
from services.billing.responses import NOT_FOUND, PROBLEMS, answer, only
from services.billing.statements import statement
from services.billing.terms import CurrentTerms
from services.billing.views import GenerationTrail, SessionUsage, UsageReport, UsageRow, trail, view
from services.kit.api_docs import documented
from services.kit.auth.guards import caller, cors, needs
from services.kit.clock import SystemClock
from services.kit.http import Check, probes
from services.kit.problem import EXCEPTION_HANDLERS, Problem

__all__ = ["build_api"]

DEFAULT_LIMIT: Final = 100
Text = Annotated[str | None, QueryParameter(max_length=200, pattern=r"^[^\x00]*$")]
Limit = Annotated[
    int, QueryParameter(ge=1, le=1_000, description="Maximum number of rows in a page", examples=[Example(value=100)])
]
Cursor = Annotated[str | None, QueryParameter(max_length=2_000, description="`next` of the previous page")]
_FILTERS: Final = ("from", "to", "tenant", "model", "provider", "status", "session", "key", "label")
_SUMS: Final = (*(name for name in Totals.__struct_fields__ if name != "amounts"), "amount", "currency")
_MOMENTS: Final = [Example(summary="a day, UTC", value="2026-01-31"), Example(value="2026-01-31T12:00:00Z")]


@get(
    "/generations/{generation:str}",
    summary="Usage of one generation",
    operation_id="generation_usage",
    tags=["usage"],
    responses={**PROBLEMS, **NOT_FOUND},
    **needs("usage"),
)
async def generation_usage(
    request: Request[Any, Any, Any],
    state: State,
    generation: Annotated[str, PathParameter(examples=[Example(value="gen_01JA2B3C4D5E6F7G8H")])],
) -> Response[GenerationTrail]:
    """Counted, reported and delivered tokens, how they compare, how it ended, and every entry of the ledger.

    Counts run while it streams.
    """
    only(request, ())
    principal = caller(request)
    found = await _reports(state).generation(principal.tenant, _name("generation", generation))
    if found is None or not principal.reaches(found.session):
        raise Problem(404, f"billing has seen no generation {generation!r}")
    entries: Entries = state.entries
    shown = trail(found, await entries.of(found.key))
    return answer(request, shown, ENTRY_COLUMNS, entry_rows)


@get(
    "/sessions/{session:str}",
    summary="Usage of one session",
    operation_id="session_usage",
    tags=["usage"],
    responses={**PROBLEMS, **NOT_FOUND},
    **needs("usage"),
)
async def session_usage(
    request: Request[Any, Any, Any],
    state: State,
    session: Annotated[str, PathParameter(examples=[Example(value="chat-42")])],
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> SessionUsage:
    """Sums over the session, and its generations in the order of their start, paged."""
    only(request, ("limit", "cursor"))
    principal = caller(request)
    filters = Filters(tenant=principal.tenant, session=_name("session", session))
    after = parse_page(filters, cursor, (int, str))
    reports = _reports(state)
    totals = await reports.totals(filters)
    if not totals.generations or not principal.reaches(session):
        raise Problem(404, f"billing has seen no session {session!r}")
    found = await reports.generations(filters, after, limit + 1)
    page, rest = found[:limit], found[limit:]
    following = write_page(filters, (page[-1].started_at, page[-1].generation)) if rest else None
    return SessionUsage(
        session=session,
        tenant=principal.tenant,
        totals=totals,
        generations=[view(g) for g in page],
        next=following,
    )


@get("/", summary="Usage by group", operation_id="usage", tags=["usage"], responses=PROBLEMS, **needs("usage"))
async def usage(
    *,
    request: Request[Any, Any, Any],
    state: State,
    from_: Annotated[
        str | None,
        QueryParameter(name="from", description="Start, inclusive, of generations' start", examples=_MOMENTS),
    ] = None,
    to: Annotated[str | None, QueryParameter(description="End, exclusive", examples=_MOMENTS)] = None,
    tenant: Text = None,
    model: Text = None,
    provider: Text = None,
    status: Text = None,
    session: Text = None,
    key: Text = None,
    label: Annotated[
        str | None,
        QueryParameter(max_length=400, description="One of the labels, as `name=value`", pattern=r"^[^\x00]*$"),
    ] = None,
    group_by: Annotated[
        list[str] | None,
        QueryParameter(
            description="Dimensions, by commas or repeated: tenant, session, model, provider, key, status, "
            "label:<name>, month, day, hour (UTC)",
            examples=[Example(value=["model,day"])],
        ),
    ] = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Response[UsageReport]:
    """Sums of tokens and amounts over generations, in one row or by group, in the order of the groups' keys."""
    only(request, (*_FILTERS, "group_by", "limit", "cursor"))
    principal = caller(request)
    dimensions = parse_group_by(group_by)
    filters = Filters(
        start=parse_moment("from", from_),
        end=parse_moment("to", to),
        tenant=principal.tenant,
        model=model,
        provider=provider,
        status=parse_status(status),
        session=session,
        key=key,
        label=parse_label(label),
    )
    if filters.start is not None and filters.end is not None and filters.start >= filters.end:
        raise BadQuestion("to: it must be after from")
    after = parse_page((filters, dimensions), cursor, [int if d in BUCKETS else str for d in dimensions])
    if session is None and not principal.reaches_all:
        raise Problem(403, "the credentials reach only some sessions: ask with session=")
    # Reveal neither another tenant's usage nor whether that tenant exists.
    foreign = tenant not in (None, principal.tenant) or (session is not None and not principal.reaches(session))
    report = UsageReport(group_by=list(dimensions), rows=[], next=None)
    if not foreign:
        report = await _report(_reports(state), filters, dimensions, after, limit)
    return answer(request, report, (*dimensions, *_SUMS), _usage_rows, report.next)


async def _report(
    reports: Reports, filters: Filters, dimensions: Sequence[str], after: PageKey | None, limit: int
) -> UsageReport:
    if not dimensions:
        return UsageReport(group_by=[], rows=[UsageRow(key={}, totals=await reports.totals(filters))], next=None)
    found = await reports.groups(filters, dimensions, after, limit + 1)
    following = write_page((filters, dimensions), found[limit - 1][0]) if len(found) > limit else None
    rows = [_row(dimensions, *one) for one in found[:limit]]
    return UsageReport(group_by=list(dimensions), rows=rows, next=following)


def _usage_rows(report: UsageReport) -> Iterable[Sequence[object]]:
    """Return one row for each group and currency; token counts are in the first row of a group."""
    for row in report.rows:
        keys = [row.key[name] for name in report.group_by]
        numbers = [getattr(row.totals, name) for name in _SUMS[:-2]]
        amounts = list(row.totals.amounts.items()) or [("", "")]
        for index, (currency, amount) in enumerate(amounts):
            yield [*keys, *(numbers if index == 0 else [""] * len(numbers)), amount, currency]


def _row(dimensions: Sequence[str], key: PageKey, totals: Totals) -> UsageRow:
    shown = {
        name: render_bucket(name, value) if isinstance(value, int) else value
        for name, value in zip(dimensions, key, strict=True)
    }
    return UsageRow(key=shown, totals=totals)


def _reports(state: State) -> Reports:
    reports: Reports = state.reports
    return reports


def _name(role: str, value: str) -> str:
    try:
        return check_name(role, value)
    except InvalidName as error:
        raise Problem(400, str(error)) from error


def _refuse(_request: Request[Any, Any, Any], error: BadQuestion) -> Response[bytes]:
    return _answer(Problem(400, str(error)))


def _postpone(_request: Request[Any, Any, Any], _error: LedgerUnavailable | LedgerUnusable) -> Response[bytes]:
    return _answer(Problem(503, "the database does not answer; try again", headers={"Retry-After": "1"}))


def _answer(problem: Problem) -> Response[bytes]:
    return Response(
        msgspec.json.encode(problem.details),
        status_code=problem.status,
        media_type="application/problem+json",
        headers=problem.headers,
    )


def build_api(
    reports: Reports,
    checks: Mapping[str, Check],
    cors_origins: Sequence[str] = (),
    terms: CurrentTerms | None = None,
    admission: Admission | None = None,
) -> Litestar:
    """Return the ASGI application, for use behind the authentication middleware; ``checks`` make up readiness.

    ``terms``: the service's settlement terms, to compute the effect of an export. ``admission``: publishes to delivery
    which tenants have budgets.
    """
    prices = Prices(reports.engine)
    money = {"prices": prices, "imports": Imports(reports.engine), "terms": terms or CurrentTerms(prices)}
    money |= {"budgets": Budgets(reports.engine), "admission": admission, "entries": Entries(reports.engine)}
    money["live"] = Live(reports, SystemClock())
    return Litestar(
        logging_config=None,  # the service sets up logging once
        request_max_body_size=None,  # `services.kit.body_limit` bounds bodies
        route_handlers=[
            Router("/v1/usage", route_handlers=[generation_usage, session_usage, live_usage, usage]),
            Router("/v1/budgets", route_handlers=[list_budgets, show_budget, put_budget, delete_budget]),
            ledger,
            reconciliations,
            statement,
            show_prices,
            put_prices,
            put_usage,
            probes(checks),
        ],
        state=State({"reports": reports, **money}),
        exception_handlers={
            **EXCEPTION_HANDLERS,
            BadQuestion: _refuse,
            LedgerUnavailable: _postpone,
            LedgerUnusable: _postpone,
        },
        cors_config=cors(cors_origins, ["GET", "POST", "PUT", "PATCH", "DELETE"]),
        openapi_config=documented(
            "Tailrace billing",
            "What generations used and cost: counted by Tailrace, reported by providers, and charged.",
            "/docs/billing",
        ),
    )
