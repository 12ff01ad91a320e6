"""Answers that several routes of the HTTP API give."""

from typing import Any, Final

import msgspec
from litestar import Response
from litestar.openapi.datastructures import ResponseSpec

from schemas.names import InvalidName, check_name
from services.delivery.errors import Deleted, Unknown
from services.kit.auth.principal import Principal
from services.kit.auth.rules import REFUSALS
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem, ProblemDetails

__all__ = ["PROBLEMS", "Accepted", "Links", "accepted", "gone", "named", "own", "reach"]

PROBLEMS: Final = {
    400: ResponseSpec(ProblemDetails, description="Not valid", media_type="application/problem+json"),
    **REFUSALS,
    404: ResponseSpec(ProblemDetails, description="No such thing", media_type="application/problem+json"),
    503: ResponseSpec(ProblemDetails, description="The broker is away", media_type="application/problem+json"),
}


class Links(msgspec.Struct):
    """Where to go from here, as paths."""

    events: str
    session: str
    generation: str
    cancel: str


class Accepted(msgspec.Struct):
    """A request has been queued. ``cursor``: read the session after it to see this generation and nothing earlier."""

    session: str
    generation: str
    cursor: str
    state: str
    links: Links


def accepted(session: str, generation: str, cursor: str, repeated: bool) -> Response[Accepted]:
    """Return the answer for a queued request; ``repeated``: it had been queued before."""
    path = f"/v1/sessions/{session}"
    links = Links(
        events=f"{path}/events?generation={generation}",
        session=path,
        generation=f"{path}/generations/{generation}",
        cancel=f"{path}/generations/{generation}/cancel",
    )
    headers = {"Location": links.generation} | ({"Idempotency-Replayed": "true"} if repeated else {})
    return Response(Accepted(session, generation, cursor, "queued", links), headers=headers, status_code=202)


def named(role: str, value: str) -> None:
    """Refuse a name that cannot stand in a subject.

    Raises:
        Problem: 400, saying what would be right.
    """
    try:
        check_name(role, value)
    except InvalidName as error:
        raise Problem(400, str(error)) from error


def own(principal: Principal, session: str) -> str:
    """Return a session's name, which must be one of the principal's.

    Raises:
        Problem: 400 for what is no name, 404 for a session that is none of its own.
    """
    named("session", session)
    if not principal.reaches(session):
        raise Problem(404, f"there is no session {session!r}")
    return session


def gone(detail: str) -> Problem:
    """Return the answer for a session that was deleted, or for what was in it."""
    return Problem(410, detail, slug="session-deleted", title="The session was deleted")


async def reach(call: Any) -> Any:
    """Await what needs the broker.

    Raises:
        Problem: 503 when the broker is away, 404 for what does not exist, 410 for what was deleted.
    """
    try:
        return await call
    except BrokerUnavailable as error:
        raise Problem(503, "the broker cannot be reached", headers={"Retry-After": "1"}) from error
    except Deleted as error:
        raise gone(str(error)) from error
    except Unknown as error:
        raise Problem(404, str(error)) from error
