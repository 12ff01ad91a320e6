"""Serve the HTTP API of tickets, for pages: their EventSource and WebSocket cannot send headers."""

from typing import Annotated, Any, Final

import msgspec
from litestar import Request, Router, post
from litestar.openapi.spec import Example
from litestar.params import Body

from services.delivery.errors import reach
from services.delivery.http.responses import PROBLEMS, own
from services.kit.auth.authenticator import Authenticator
from services.kit.auth.guards import caller, needs
from services.kit.auth.principal import authorize
from services.kit.auth.tickets import TicketScope
from services.kit.clock import Clock

__all__ = ["Ticket", "TicketSpec", "tickets_router"]

_SESSIONS: Final = 50
_EXAMPLE: Final = {"sessions": ["demo"]}


class TicketSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The sessions, by name, and the scopes of a ticket; the caller must have these scopes."""

    sessions: Annotated[list[str], msgspec.Meta(min_length=1, max_length=_SESSIONS)]
    scopes: Annotated[list[TicketScope], msgspec.Meta(min_length=1, max_length=4)] = msgspec.field(
        default_factory=lambda: ["read"]
    )


class Ticket(msgspec.Struct, kw_only=True):
    """A ticket. ``expires_at``: end of its use for connecting, in seconds since 1970."""

    ticket: str
    expires_at: float


def tickets_router(authenticator: Authenticator, clock: Clock, seconds: float) -> Router:
    """Return the route ``/v1/tickets``; ``seconds``: lifetime of a ticket."""

    @post("/", summary="Get a ticket", operation_id="createTicket", responses=PROBLEMS, **needs("read"))
    async def create_ticket(
        request: Request[Any, Any, Any],
        data: Annotated[TicketSpec, Body(examples=[Example(summary="To read a session", value=_EXAMPLE)])],
    ) -> Ticket:
        principal = caller(request)
        for scope in data.scopes:
            authorize(principal, scope)
        sessions = tuple(dict.fromkeys(own(principal, session) for session in data.sessions))
        now = clock.wall()
        expires_at = now + seconds if principal.expires_at is None else min(now + seconds, principal.expires_at)
        ticket = await reach(authenticator.ticket(principal, sessions, frozenset(data.scopes), expires_at))
        return Ticket(ticket=ticket, expires_at=expires_at)

    return Router("/v1/tickets", route_handlers=[create_ticket], tags=["tickets"])
