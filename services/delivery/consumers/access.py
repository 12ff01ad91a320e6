"""Authorize the use of durable consumers, for all protocols."""

from schemas.names import InvalidName, check_name
from services.delivery.consumers.registry import Consumers, Found
from services.delivery.consumers.session import ConsumerSession
from services.delivery.errors import Unknown, unreachable
from services.kit.auth.principal import Principal, authorize
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem

__all__ = ["covers", "open_session", "permitted"]


def covers(principal: Principal, session: str | None) -> bool:
    """Return whether a principal may read ``session``; ``None``: all sessions of the tenant."""
    return "*" in principal.sessions if session is None else principal.reaches(session)


async def permitted(consumers: Consumers, principal: Principal, name: str, *, recent: bool = False) -> Found:
    """Return a consumer that the principal may use. ``recent``: accept a cached state, a few seconds old.

    Raises:
        Problem: 400, the name is not valid; 403, the scope is missing; 404, no such consumer for this principal; 503.
    """
    authorize(principal, "consume")
    try:
        check_name("consumer", name)
        found = await (consumers.recent if recent else consumers.get)(principal.tenant, name)
    except InvalidName as error:
        raise Problem(400, str(error)) from error
    except Unknown as error:
        raise Problem(404, str(error)) from error
    except BrokerUnavailable as error:
        raise unreachable() from error
    if not covers(principal, found.definition.spec.session):
        raise Problem(404, f"there is no consumer {name!r}")
    return found


async def open_session(consumers: Consumers, principal: Principal, name: str) -> ConsumerSession:
    """Open a session that reads through a consumer; the caller closes it, at the latest when the principal expires.

    Raises:
        Problem: as `permitted`; 503 also while this replica drains.
    """
    await permitted(consumers, principal, name)
    if consumers.supervisor.draining:
        raise Problem(503, "this replica is going away", headers={"Retry-After": "1"})
    try:
        return await consumers.open(principal.tenant, name)
    except Unknown as error:
        raise Problem(404, str(error)) from error
    except BrokerUnavailable as error:
        raise unreachable() from error
