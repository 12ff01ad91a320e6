"""Who may use which durable consumer: the same for every protocol."""

from schemas.names import InvalidName, check_name
from services.delivery.consumers.registry import Consumers, Found
from services.delivery.consumers.session import ConsumerSession
from services.delivery.errors import Unknown, unreachable
from services.kit.auth.principal import Principal, authorize
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem

__all__ = ["covers", "open_session", "permitted"]


def covers(principal: Principal, session: str | None) -> bool:
    """Tell whether a caller may read a session; ``None``: all of the tenant's."""
    return "*" in principal.sessions if session is None else principal.reaches(session)


async def permitted(consumers: Consumers, principal: Principal, name: str, *, recent: bool = False) -> Found:
    """Return a consumer that the caller may use. ``recent``: what was known a moment ago will do.

    Raises:
        Problem: 400 for what is no name; 403 without the scope; 404 where there is none for this caller; 503.
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
    """Return a session that reads through a consumer; close it in the end, at the latest when the caller expires.

    Raises:
        Problem: as `permitted`; 503 also while this replica is going away.
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
