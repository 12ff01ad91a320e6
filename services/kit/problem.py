"""Errors over HTTP as RFC 9457 problem details, each with a stable ``type``."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.types import ExceptionHandlersMap

__all__ = [
    "EXCEPTION_HANDLERS",
    "MEDIA_TYPE",
    "Problem",
    "ProblemDetails",
    "problem_bytes",
    "problem_headers",
    "send_problem",
]

log = structlog.get_logger()
MEDIA_TYPE: Final = "application/problem+json"
_TYPE_BASE: Final = "urn:tailrace:problem:"
_TITLES: Final = {
    400: ("bad-request", "The request is not valid"),
    401: ("unauthenticated", "Credentials are missing or not valid"),
    402: ("payment-required", "What pays for this is used up"),
    403: ("forbidden", "The credentials do not allow this"),
    404: ("not-found", "There is no such thing"),
    405: ("method-not-allowed", "This method is not allowed here"),
    406: ("not-acceptable", "No acceptable representation"),
    409: ("conflict", "The request conflicts with an earlier one"),
    410: ("gone", "It is no longer kept"),
    413: ("too-large", "The request is too large"),
    415: ("unsupported-media-type", "This media type is not understood"),
    422: ("unprocessable", "The request cannot be carried out"),
    429: ("too-many-requests", "Too many requests"),
    431: ("headers-too-large", "The headers are too large"),
    500: ("internal", "Something went wrong here"),
    501: ("not-implemented", "This is not implemented here"),
    503: ("unavailable", "Not available at the moment"),
}


class ProblemDetails(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The body of an error answer (RFC 9457). ``errors`` lists single faults of a body or query."""

    type: str
    title: str
    status: int
    detail: str = ""
    errors: list[dict[str, Any]] = []


class Problem(Exception):
    """An error with its HTTP response. ``slug`` is the stable end of the problem's ``type``."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        slug: str | None = None,
        title: str | None = None,
        headers: Mapping[str, str] | None = None,
        errors: list[dict[str, Any]] | None = None,
    ) -> None:
        default_slug, default_title = _TITLES.get(status, ("error", "Error"))
        self.status = status
        self.headers = dict(headers or {})
        self.details = ProblemDetails(
            type=_TYPE_BASE + (slug or default_slug),
            title=title or default_title,
            status=status,
            detail=detail,
            errors=errors or [],
        )
        super().__init__(detail)


def problem_bytes(problem: Problem) -> bytes:
    """Encode a problem as JSON, for responses that do not pass through Litestar."""
    return msgspec.json.encode(problem.details)


def problem_headers(problem: Problem, body: bytes) -> list[tuple[bytes, bytes]]:
    """Return the ASGI headers of a problem response with that body."""
    return [
        (b"content-type", MEDIA_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in problem.headers.items()),
    ]


async def send_problem(send: Any, problem: Problem, kind: str = "http") -> None:
    """Send a problem from a raw ASGI application; ``kind``: prefix of its message types."""
    body = problem_bytes(problem)
    headers = problem_headers(problem, body)
    await send({"type": f"{kind}.response.start", "status": problem.status, "headers": headers})
    await send({"type": f"{kind}.response.body", "body": body, "more_body": False})


def _response(problem: Problem) -> Response[bytes]:
    return Response(
        content=problem_bytes(problem), status_code=problem.status, media_type=MEDIA_TYPE, headers=problem.headers
    )


def _handle_problem(_request: Request[Any, Any, Any], error: Problem) -> Response[bytes]:
    return _response(error)


def _handle_validation(_request: Request[Any, Any, Any], error: ValidationException) -> Response[bytes]:
    extra = error.extra if isinstance(error.extra, list) else []
    faults = [{k: str(v) for k, v in e.items()} for e in extra if isinstance(e, dict)]
    detail = "; ".join(f"{e.get('key', '')}: {e.get('message', '')}".strip(": ") for e in faults) or error.detail
    return _response(Problem(400, detail, errors=faults))


def _handle_http(_request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    detail = error.detail if error.status_code < 500 else ""
    return _response(Problem(error.status_code, detail, headers=dict(error.headers or {})))


def _handle_unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    log.error("request failed", path=request.url.path, method=request.method, exc_info=error)
    return _response(Problem(500, "the error has been logged"))


EXCEPTION_HANDLERS: Final[ExceptionHandlersMap] = {
    Problem: _handle_problem,
    ValidationException: _handle_validation,
    HTTPException: _handle_http,
    Exception: _handle_unexpected,
}
