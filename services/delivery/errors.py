"""Delivery's errors, grouped by what a client must do, and the problems (RFC 9457) that they are to clients."""

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
    """Reject: the cursor is not one of this session."""


class CursorExpired(DeliveryError):
    """Start over: what follows the cursor is no longer kept, or the log has been re-created."""


class Unknown(DeliveryError):
    """Reject: no such generation."""


class Deleted(DeliveryError):
    """Reject: the session was deleted."""


class TooBusy(DeliveryError):
    """Retry later: a bound of this replica is reached."""


def problem_of(error: DeliveryError) -> Problem:
    """Return the problem that an error of this service is to clients; gRPC maps its status to a code."""
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
    """Return the problem for a session that was deleted, or for what was in it."""
    return Problem(410, detail, slug="session-deleted", title="The session was deleted")


def unreachable(what: str = "the broker") -> Problem:
    """Return the problem for what needs a broker that is away."""
    return Problem(503, f"{what} cannot be reached", headers={"Retry-After": "1"})


def named(role: str, value: str) -> None:
    """Refuse a name that cannot stand in a subject.

    Raises:
        Problem: 400, saying what would be right.
    """
    try:
        check_name(role, value)
    except InvalidName as error:
        raise Problem(400, str(error)) from error


async def reach(call: Awaitable[T]) -> T:
    """Await a call that needs the broker.

    Raises:
        Problem: 503 when the broker is away, 404 for what does not exist, 410 for what was deleted.
    """
    try:
        return await call
    except BrokerUnavailable as error:
        raise unreachable() from error
    except (Unknown, Deleted) as error:
        raise problem_of(error) from error
