"""Define delivery's errors, grouped by what a client must do, and map them to problem details (RFC 9457)."""

from collections.abc import Awaitable
from typing import TypeVar

from schemas.names import InvalidName, check_name
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem

__all__ = [
    "CursorExpired",
    "CursorForeign",
    "Deleted",
    "DeliveryError",
    "TooBusy",
    "Unknown",
    "gone",
    "named",
    "problem_of",
    "reach",
    "unreachable",
]

T = TypeVar("T")


class DeliveryError(Exception):
    """Base of all errors of this service."""


class CursorForeign(DeliveryError):
    """Reject: the cursor is not valid or belongs to another session."""


class CursorExpired(DeliveryError):
    """Start over: the events after the cursor are no longer kept, or the log has been re-created."""


class Unknown(DeliveryError):
    """Reject: the generation does not exist."""


class Deleted(DeliveryError):
    """Reject: the session was deleted."""


class TooBusy(DeliveryError):
    """Retry later: a bound of this replica is reached."""


def problem_of(error: DeliveryError) -> Problem:
    """Return the problem details for an error of this service; gRPC maps the status to a code."""
    match error:
        case CursorForeign():
            return Problem(400, str(error), slug="cursor-invalid", title="The cursor is not valid here")
        case CursorExpired():
            return Problem(410, str(error), slug="cursor-expired", title="The cursor has expired")
        case Deleted():
            return gone(str(error))
        case Unknown():
            return Problem(404, str(error))
        case TooBusy():
            return Problem(503, str(error), headers={"Retry-After": "2"})
        case _:
            return Problem(500, "the error has been logged")


def gone(detail: str) -> Problem:
    """Return the problem for a deleted session, or for anything that was in it."""
    return Problem(410, detail, slug="session-deleted", title="The session was deleted")


def unreachable(what: str = "the broker") -> Problem:
    """Return the problem for a request that needs ``what``, which cannot be reached."""
    return Problem(503, f"{what} cannot be reached", headers={"Retry-After": "1"})


def named(role: str, value: str) -> None:
    """Refuse a name that is not valid in a subject.

    Raises:
        Problem: 400; its detail names the valid form.
    """
    try:
        check_name(role, value)
    except InvalidName as error:
        raise Problem(400, str(error)) from error


async def reach(call: Awaitable[T]) -> T:
    """Await a call that needs the broker.

    Raises:
        Problem: 503 when the broker does not answer, 404 for an unknown generation, 410 for a deleted session.
    """
    try:
        return await call
    except BrokerUnavailable as error:
        raise unreachable() from error
    except (Unknown, Deleted) as error:
        raise problem_of(error) from error
