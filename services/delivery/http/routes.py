"""Define the routes of events over HTTP."""

from typing import Any

from litestar import Request, get, post
from litestar.params import FromPath
from litestar.types import ASGIApp

from services.delivery.http.events import SessionEvents
from services.delivery.http.read_request import parse_read_request
from services.kit.auth.guards import needs

__all__ = ["events_handlers"]


def events_handlers(events: SessionEvents) -> list[Any]:
    """Return the routes of the events of one session and of several sessions, with a query or a body."""

    @get("/v1/sessions/{session:str}/events", include_in_schema=False, **needs("read"))
    async def session_events(request: Request[Any, Any, Any], session: FromPath[str]) -> ASGIApp:
        return await events.of_session(request.scope, request.receive, parse_read_request(request.scope), session)

    @post("/v1/sessions/{session:str}/events", status_code=200, include_in_schema=False, **needs("read"))
    async def ask_session_events(request: Request[Any, Any, Any], session: FromPath[str]) -> ASGIApp:
        ask = parse_read_request(request.scope, await request.body())
        return await events.of_session(request.scope, request.receive, ask, session)

    @get("/v1/events", include_in_schema=False, **needs("read"))
    async def several_events(request: Request[Any, Any, Any]) -> ASGIApp:
        return await events.of_several(request.scope, parse_read_request(request.scope, several=True))

    @post("/v1/events", status_code=200, include_in_schema=False, **needs("read"))
    async def ask_several_events(request: Request[Any, Any, Any]) -> ASGIApp:
        return await events.of_several(
            request.scope, parse_read_request(request.scope, await request.body(), several=True)
        )

    return [session_events, ask_session_events, several_events, ask_several_events]
