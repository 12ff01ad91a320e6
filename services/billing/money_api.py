"""The HTTP API: the price book, and imports of provider exports."""

import hashlib
import time
from typing import Annotated, Any, Final

import msgspec
from litestar import Request, Response, get, post, put
from litestar.datastructures import State
from litestar.openapi import ResponseSpec
from litestar.params import QueryParameter

from services.billing.adapters.imports import Imported, Imports
from services.billing.adapters.prices import Change, KeptPrice, Prices
from services.billing.core.money import render
from services.billing.core.price_file import COLUMNS, BadPrices, render_moment, render_rows
from services.billing.core.provider_export import BadExport, parse_export
from services.billing.price_loading import parse_prices
from services.billing.terms import CurrentTerms
from services.kit.auth.guards import REFUSALS, caller, needs
from services.kit.problem import Problem, ProblemDetails

__all__ = ["put_prices", "put_usage", "show_prices"]

_MEDIA: Final = {
    "application/toml": "toml",
    "text/csv": "csv",
    "application/json": "json",
}
_DRY: Final = "Tell what it would change, and change nothing"
DryRun = Annotated[bool, QueryParameter(description=_DRY)]
_PROBLEMS: Final = {
    status: ResponseSpec(ProblemDetails, description=text, media_type="application/problem+json")
    for status, text in (
        (400, "A parameter is not valid"),
        (415, "The body is of another type"),
        (422, "The body has faults; `errors` lists each of them"),
        (503, "The database does not answer"),
    )
} | REFUSALS


class PriceView(msgspec.Struct, kw_only=True, rename={"from_": "from", "class_": "class"}):
    """One row: amount per 1,000,000 tokens (``per_request``: per request), valid from ``from`` up to ``until``.

    ``revision`` of the book added it; ``withdrawn`` is the one that withdrew it, if any.
    """

    id: int
    provider: str
    model: str
    class_: str
    currency: str
    amount: str
    from_: str
    until: str | None
    revision: int
    withdrawn: int | None


class PriceList(msgspec.Struct, kw_only=True):
    """The price book at a revision."""

    revision: int
    prices: list[PriceView]


class ImportView(msgspec.Struct, kw_only=True):
    """The result of an import of a provider's export or, on a dry run, the expected result. ``difference``: amounts by
    currency.
    """

    rows: int
    new: int
    repeated: int
    matched: int
    corrections: int
    difference: dict[str, str]
    dry_run: bool


@get(
    "/v1/prices", summary="The price book", operation_id="prices", tags=["money"], responses=_PROBLEMS, **needs("usage")
)
async def show_prices(
    request: Request[Any, Any, Any],
    state: State,
    history: Annotated[bool, QueryParameter(description="Include the rows that are no longer valid")] = False,
) -> Response[Any]:
    """Return the current rows, or all rows ever stored. The CSV form (``Accept: text/csv``) can be uploaded again
    unchanged.
    """
    prices: Prices = state.prices
    rows = [row for row in await prices.history() if history or row.withdrawn is None]
    if "text/csv" in request.headers.get("accept", "") and not history:
        return Response(_as_csv(rows), media_type="text/csv")
    revision = (await prices.book()).revision
    return Response(PriceList(revision=revision, prices=[_view(row) for row in rows]))


@put(
    "/v1/prices",
    summary="Replace the price book",
    operation_id="put_prices",
    tags=["money"],
    responses=_PROBLEMS,
    **needs("admin"),
)
async def put_prices(request: Request[Any, Any, Any], state: State, dry_run: DryRun = False) -> Change:
    """Replace the price book by the body (TOML, CSV or JSON). Equal rows stay; the others are withdrawn.

    Generations that the change concerns are settled again: those without a price get one, others a correction.
    """
    if not caller(request).operator:
        raise Problem(403, "the price book applies to every tenant: only the operator may change it")
    data = await request.body()
    try:
        rows = parse_prices(_kind(request, ("toml", "csv", "json")), data)
    except BadPrices as error:
        faults: list[dict[str, Any]] = [{"line": f.line, "message": f.message} for f in error.faults]
        raise Problem(422, f"{len(faults)} faults in the prices", errors=faults) from error
    prices: Prices = state.prices
    digest = hashlib.sha256(data).hexdigest()
    return await prices.put(rows, source="api", digest=digest, now=_now(), dry_run=dry_run)


@post(
    "/v1/provider-usage",
    summary="Bring in a provider's export",
    operation_id="provider_usage",
    tags=["money"],
    responses=_PROBLEMS,
    status_code=200,
    **needs("admin"),
)
async def put_usage(
    request: Request[Any, Any, Any],
    state: State,
    provider: Annotated[str, QueryParameter(max_length=200, description="Default for rows that name none")] = "",
    dry_run: DryRun = False,
) -> ImportView:
    """Import rows of usage (JSON or CSV), each named by our generation or the provider's id; all rows or none.

    A repeated row changes nothing. Differences from the charged amount become corrections.
    """
    principal = caller(request)
    if not principal.reaches_all:
        raise Problem(403, "the credentials reach only some sessions, and an export covers all of them")
    try:
        rows = parse_export(_kind(request, ("csv", "json")), await request.body(), provider.replace("\0", ""))
    except BadExport as error:
        faults: list[dict[str, Any]] = [{"row": f.row, "message": f.message} for f in error.faults]
        raise Problem(422, f"{len(faults)} faults in the export", errors=faults[:1_000]) from error
    imports: Imports = state.imports
    terms: CurrentTerms = state.terms
    done = await imports.put(
        principal.tenant, rows, source="api", now=_now(), terms=await terms.refresh(), dry_run=dry_run
    )
    return _import_view(done)


def _kind(request: Request[Any, Any, Any], allowed: tuple[str, ...]) -> str:
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    kind = _MEDIA.get(media)
    if kind not in allowed:
        wanted = ", ".join(name for name, k in _MEDIA.items() if k in allowed)
        raise Problem(415, f"content type {media[:80]!r} is not understood: use {wanted}")
    return kind


def _as_csv(rows: list[KeptPrice]) -> str:
    lines = [",".join(COLUMNS)]
    lines += [",".join(_cell(record[c]) for c in COLUMNS) for record in render_rows(row.price for row in rows)]
    return "\r\n".join(lines) + "\r\n"


def _cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r\n') else text


def _view(row: KeptPrice) -> PriceView:
    p = row.price
    return PriceView(
        id=p.id,
        provider=p.provider,
        model=p.model,
        class_=p.token_class,
        currency=p.currency,
        amount=render(p.amount),
        from_=render_moment(p.valid_from),
        until=None if p.valid_until is None else render_moment(p.valid_until),
        revision=row.revision,
        withdrawn=row.withdrawn,
    )


def _import_view(done: Imported) -> ImportView:
    fields = msgspec.structs.asdict(done) | {"difference": {c: render(a) for c, a in done.difference.items()}}
    return ImportView(**fields)


def _now() -> int:
    return round(time.time() * 1_000)
