"""Responses as JSON or CSV by content negotiation, with an ``ETag``."""

import csv
import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from litestar import Request, Response
from litestar.openapi import ResponseSpec

from services.kit.auth.guards import REFUSALS
from services.kit.problem import Problem, ProblemDetails

__all__ = ["NOT_FOUND", "PROBLEMS", "answer", "only", "wants_csv"]

_PROBLEM: Final = "application/problem+json"
PROBLEMS: Final = {
    400: ResponseSpec(ProblemDetails, description="A parameter is not valid", media_type=_PROBLEM),
    **REFUSALS,
    503: ResponseSpec(ProblemDetails, description="The database does not answer", media_type=_PROBLEM),
}
NOT_FOUND: Final = {404: ResponseSpec(ProblemDetails, description="Billing knows no such thing", media_type=_PROBLEM)}
T = TypeVar("T")


def wants_csv(request: Request[Any, Any, Any]) -> bool:
    """Return whether the client prefers CSV to JSON."""
    accept = request.headers.get("accept", "")
    return "text/csv" in accept and "application/json" not in accept


def answer(
    request: Request[Any, Any, Any],
    report: T,
    columns: Sequence[str],
    rows: Callable[[T], Iterable[Sequence[object]]],
    following: str | None = None,
) -> Response[Any]:
    """Return ``report`` as JSON, or its ``rows`` as CSV; 304 if the client's ``ETag`` is current.

    ``following``: cursor of the next page; with CSV it is in the ``Link`` header.
    """
    is_csv = wants_csv(request)
    body = _as_csv(columns, rows(report)) if is_csv else msgspec.json.encode(report)
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Accept, Authorization"}
    if following is not None:
        query = dict(request.query_params.dict()) | {"cursor": following}
        headers["Link"] = f'<{quote(request.url.path)}?{urlencode(query, doseq=True)}>; rel="next"'
    if tag in request.headers.get("if-none-match", "").replace("W/", "").split(", "):
        return Response(b"", status_code=304, headers=headers)
    return Response(body, media_type="text/csv; charset=utf-8" if is_csv else "application/json", headers=headers)


def _as_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue().encode()


def _cell(value: object) -> object:
    """Return a cell; escape text that a spreadsheet would take for a formula."""
    if value is None:
        return ""
    if isinstance(value, str) and value[:1] in ("=", "+", "@", "\t", "\r"):
        return f"'{value}"
    return value


def only(request: Request[Any, Any, Any], known: Sequence[str]) -> None:
    """Reject unknown query parameters.

    Raises:
        Problem: 400.
    """
    unknown = sorted(set(request.query_params.keys()) - set(known))
    if unknown:
        allowed = f"use {', '.join(known)}" if known else "there is none here"
        raise Problem(400, f"no such parameter: {', '.join(repr(name[:40]) for name in unknown)}; {allowed}")
