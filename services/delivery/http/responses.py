"""Build responses and checks shared by several routes of the HTTP API."""

from typing import Any, Final

import msgspec
from litestar import Response
from litestar.openapi.datastructures import ResponseSpec
from litestar.types import ASGIApp

from services.delivery.errors import named
from services.kit.auth.guards import REFUSALS
from services.kit.auth.principal import Principal
from services.kit.problem import Problem, ProblemDetails

__all__ = ["PROBLEMS", "Links", "QueuedRequest", "StreamedResponse", "accepted", "own", "start_headers"]

PROBLEMS: Final = {
    400: ResponseSpec(ProblemDetails, description="The request is not valid", media_type="application/problem+json"),
    **REFUSALS,
    404: ResponseSpec(ProblemDetails, description="The resource does not exist", media_type="application/problem+json"),
    503: ResponseSpec(
        ProblemDetails, description="The broker cannot be reached", media_type="application/problem+json"
    ),
}


class Links(msgspec.Struct):
    """Paths of the related resources."""

    events: str
    session: str
    generation: str
    cancel: str


class QueuedRequest(msgspec.Struct):
    """A queued request. ``cursor``: read the session after it to get this generation and nothing earlier."""

    session: str
    generation: str
    cursor: str
    state: str
    links: Links


def accepted(session: str, generation: str, cursor: str, repeated: bool) -> Response[QueuedRequest]:
    """Return the response 202 for a queued request; ``repeated``: it was queued by an earlier request."""
    path = f"/v1/sessions/{session}"
    links = Links(
        events=f"{path}/events?generation={generation}",
        session=path,
        generation=f"{path}/generations/{generation}",
        cancel=f"{path}/generations/{generation}/cancel",
    )
    headers = {"Location": links.generation} | ({"Idempotency-Replayed": "true"} if repeated else {})
    return Response(QueuedRequest(session, generation, cursor, "queued", links), headers=headers, status_code=202)


def start_headers(session: str, generation: str, cursor: str, repeated: bool) -> list[tuple[bytes, bytes]]:
    """Return the headers of a stream that answers a start: what the body of `accepted` would say."""
    headers = [
        (b"location", f"/v1/sessions/{session}/generations/{generation}".encode()),
        (b"tailrace-generation", generation.encode()),
        (b"tailrace-cursor", cursor.encode()),
    ]
    return [*headers, (b"idempotency-replayed", b"true")] if repeated else headers


class StreamedResponse(Response[Any]):
    """Answer with a raw ASGI application, from a handler that otherwise returns a body."""

    def __init__(self, answer: ASGIApp) -> None:
        super().__init__(None)
        self._answer = answer

    def to_asgi_response(self, *_: Any, **__: Any) -> Any:
        """Return the application."""
        return self._answer


def own(principal: Principal, session: str) -> str:
    """Return a session's name after checking that the principal reaches it.

    Raises:
        Problem: 400 for a name that is not valid, 404 for a session that the principal does not reach.
    """
    named("session", session)
    if not principal.reaches(session):
        raise Problem(404, f"there is no session {session!r}")
    return session
