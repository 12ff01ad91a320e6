"""Guards of the HTTP API's operations: checked before the body is read, and shown in OpenAPI."""

from collections.abc import Sequence
from typing import Any, Final

from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Components, SecurityScheme

from services.kit.auth.principal import Principal, Scope, authorize, principal_of
from services.kit.problem import ProblemDetails

__all__ = ["REFUSALS", "SECURITY", "caller", "cors", "needs"]

_CREDENTIALS: Final = "credentials"
SECURITY: Final = Components(
    security_schemes={
        _CREDENTIALS: SecurityScheme(
            type="http",
            scheme="bearer",
            description="An API key or a JSON web token; each operation names its scope.",
        )
    }
)
REFUSALS: Final = {
    401: ResponseSpec(
        ProblemDetails, description="The credentials are missing or not valid", media_type="application/problem+json"
    ),
    403: ResponseSpec(ProblemDetails, description="Not allowed", media_type="application/problem+json"),
}


def needs(scope: Scope) -> dict[str, Any]:
    """Return the route handler arguments that require a scope; ``caller`` then returns the principal."""

    def guard(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
        authorize(principal_of(connection.scope), scope)

    return {"guards": [guard], "security": [{_CREDENTIALS: [scope]}]}


def caller(connection: ASGIConnection[Any, Any, Any, Any]) -> Principal:
    """Return the principal of a request.

    Raises:
        Problem: 401.
    """
    return principal_of(connection.scope)


def cors(origins: Sequence[str], methods: Sequence[str]) -> CORSConfig | None:
    """Return the CORS configuration for pages of these origins; ``None`` without any.

    ``*`` allows every origin, but without credentials such as cookies.
    """
    if not origins:
        return None
    return CORSConfig(
        allow_origins=list(origins),
        allow_methods=list(methods),  # type: ignore[arg-type]  # names of methods
        allow_headers=["Accept", "Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
        allow_credentials="*" not in origins,
        expose_headers=[
            "Location",
            "Idempotency-Replayed",
            "Retry-After",
            "Tailrace-Cursor",
            "Tailrace-Generation",
            "WWW-Authenticate",
        ],
        max_age=600,
    )
