"""Statements: a tenant's usage in a month, by model, as JSON, CSV and a page to print."""

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from html import escape
from typing import Annotated, Any, Final

import msgspec
from litestar import Request, Response, get
from litestar.datastructures import State
from litestar.openapi import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import PathParameter

from services.billing.adapters.reports import Reports, Totals
from services.billing.core.money import render
from services.billing.core.question import BadQuestion, Filters
from services.billing.responses import PROBLEMS, answer, only
from services.kit.auth.guards import caller, needs
from services.kit.problem import Problem

__all__ = ["StatementLine", "Statement", "statement"]

MOST_LINES: Final = 10_000
_MONTH: Final = re.compile(r"(\d{4})-(0[1-9]|1[0-2])")
_COLUMNS: Final = (
    "provider",
    "model",
    "status",
    "generations",
    "input",
    "cached_input",
    "cache_write",
    "cache_write_1h",
    "output",
    "reasoning",
    "charged_tokens",
    "unpriced",
    "amount",
    "currency",
)
_STYLE: Final = """
:root{color-scheme:light dark;font:15px/1.45 system-ui,sans-serif}
body{max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .5rem;text-align:right;border-bottom:1px solid color-mix(in srgb,currentColor 25%,transparent)}
th:nth-child(-n+3),td:nth-child(-n+3){text-align:left}
tfoot td{font-weight:600;border-top:2px solid}
p{margin:.3rem 0}
@media print{body{margin:0;max-width:none}}
"""


class StatementLine(msgspec.Struct, kw_only=True):
    """One model of one provider and the `status` of its generations after reconciliation."""

    provider: str
    model: str
    status: str
    totals: Totals


class Statement(msgspec.Struct, kw_only=True):
    """The usage and cost of a tenant's generations that started in a month. Times in RFC 3339, UTC.

    ``final``: whether the month is over and all of its generations have settled; later corrections still change it.
    """

    tenant: str
    month: str
    since: str
    until: str
    final: bool
    lines: list[StatementLine]
    amounts: dict[str, str]
    unpriced: int
    open: int


@get(
    "/v1/statements/{month:str}",
    summary="Statement of a month",
    operation_id="statement",
    tags=["money"],
    responses={200: ResponseSpec(Statement, description="The statement"), **PROBLEMS},
    **needs("usage"),
)
async def statement(
    request: Request[Any, Any, Any],
    state: State,
    month: Annotated[str, PathParameter(examples=[Example(value="2026-01")])],
) -> Response[Any]:
    """As JSON, as CSV (``Accept: text/csv``), and as a page to print (``Accept: text/html``)."""
    only(request, ())
    principal = caller(request)
    if not principal.reaches_all:
        raise Problem(403, "the credentials reach only some sessions, and a statement covers all of them")
    since, until = _bounds(month)
    reports: Reports = state.reports
    filters = Filters(tenant=principal.tenant, start=_ms(since), end=_ms(until))
    found = await reports.groups(filters, ("provider", "model", "status"), None, MOST_LINES)
    made = _statement(principal.tenant, month, (since, until), found)
    if "text/html" in request.headers.get("accept", ""):
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response(_page(made).encode(), media_type="text/html; charset=utf-8", headers=headers)
    return answer(request, made, _COLUMNS, _rows)


def _bounds(month: str) -> tuple[datetime, datetime]:
    match = _MONTH.fullmatch(month)
    if match is None or int(match[1]) < 1970 or int(match[1]) > 9_998:
        raise BadQuestion(f"month: {month[:40]!r} is not a month such as 2026-01")
    year, number = int(match[1]), int(match[2])
    after = (year + 1, 1) if number == 12 else (year, number + 1)
    return datetime(year, number, 1, tzinfo=UTC), datetime(*after, 1, tzinfo=UTC)


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1_000)


def _statement(
    tenant: str,
    month: str,
    bounds: tuple[datetime, datetime],
    found: Sequence[tuple[tuple[str | int, ...], Totals]],
) -> Statement:
    lines = [
        StatementLine(provider=str(provider), model=str(model), status=str(status), totals=totals)
        for (provider, model, status), totals in found
    ]
    amounts: dict[str, Decimal] = {}
    for line in lines:
        for currency, amount in line.totals.amounts.items():
            amounts[currency] = amounts.get(currency, Decimal(0)) + Decimal(amount)
    waiting = sum(line.totals.generations for line in lines if line.status in ("running", "awaiting_provider"))
    since, until = bounds
    return Statement(
        tenant=tenant,
        month=month,
        since=f"{since:%Y-%m-%dT%H:%M:%SZ}",
        until=f"{until:%Y-%m-%dT%H:%M:%SZ}",
        final=until <= datetime.now(UTC) and not waiting,
        lines=lines,
        amounts={currency: render(amount) for currency, amount in sorted(amounts.items())},
        unpriced=sum(line.totals.unpriced for line in lines),
        open=waiting,
    )


def _rows(made: Statement) -> Iterable[Sequence[object]]:
    for line in made.lines:
        t = line.totals
        inputs = (t.input, t.cached_input, t.cache_write, t.cache_write_1h)
        numbers = (t.generations, *inputs, t.output, t.reasoning, t.tokens, t.unpriced)
        for index, (currency, amount) in enumerate(list(t.amounts.items()) or [("", "")]):
            shown: Sequence[object] = numbers if index == 0 else [""] * len(numbers)
            yield [line.provider, line.model, line.status, *shown, amount, currency]


def _page(made: Statement) -> str:
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in _COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in _rows(made))
    total = ", ".join(f"{amount} {currency}" for currency, amount in made.amounts.items()) or "nothing"
    notes = [
        f"Generations that have not settled yet: {made.open}." if made.open else "",
        f"Generations without a price, which are not in the amounts: {made.unpriced}." if made.unpriced else "",
        "" if made.final else "This statement is not final.",
    ]
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes if note)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Statement {made.month}</title>'
        f"<style>{_STYLE}</style><h1>Statement {made.month}</h1>"
        f"<p>Tenant <b>{escape(made.tenant)}</b>, generations started from {made.since} up to {made.until}</p>"
        f"<p>In all: <b>{escape(total)}</b></p>{paragraphs}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></html>"
    )


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
