"""Serve the HTTP API of dead requests, which no producer could run: list, view, resend, remove."""

from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec
from litestar import Request as HttpRequest
from litestar import Response, Router, delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import FromPath, FromQuery, QueryParameter

from schemas.requests import Request
from services.delivery.errors import named, reach
from services.delivery.http.responses import PROBLEMS, QueuedRequest, accepted
from services.delivery.requests.dead import Dead, DeadRequests
from services.delivery.requests.intake import GenerationRequest, Intake
from services.kit.auth.guards import caller, needs
from services.kit.auth.principal import Principal
from services.kit.jetstream.broker import Broker
from services.kit.problem import Problem, ProblemDetails

__all__ = ["DeadRequest", "DeadRequestList", "DeadRequestView", "dead_router"]

_LIMIT: Final = 200


class DeadRequest(msgspec.Struct, kw_only=True):
    """One line of the list of dead requests. ``died_at``: seconds since 1970.

    ``readable``: whether it can be sent again. ``session`` and ``model`` are null when it is not readable.
    """

    generation: str
    session: str | None
    model: str | None
    reason: str
    died_at: float
    readable: bool


class DeadRequestList(msgspec.Struct):
    """Dead requests, oldest first. ``next``: pass it as ``after`` for the next page."""

    requests: list[DeadRequest]
    next: str | None = None


class DeadRequestView(DeadRequest, kw_only=True):
    """A dead request as a whole: ``request``, or ``raw`` as text when it is not readable.

    Both are null when the tenant of the request cannot be determined.
    """

    request: Request | None = None
    raw: str | None = None


_LINE: Final = {
    "generation": "gen_6f1d0c2a9b3e4f5a6b7c8d9e",
    "session": "demo",
    "model": "scripted/story",
    "reason": "max_deliver",
    "died_at": 1790000000.5,
    "readable": True,
}
_REQUEST: Final = {
    "tenant": "default",
    "session": "demo",
    "generation": "gen_6f1d0c2a9b3e4f5a6b7c8d9e",
    "model": "scripted/story",
    "messages": [{"role": "user", "content": "Tell me about rivers"}],
    "created_at": 1789999970.25,
}
_RESENT: Final = {
    "session": "demo",
    "generation": "gen_w5x2k7q3m4n6p8r2s3t4u5v6y7",
    "cursor": "t1002d71164239697f2300000000000c",
    "state": "queued",
    "links": {
        "events": "/v1/sessions/demo/events?generation=gen_w5x2k7q3m4n6p8r2s3t4u5v6y7",
        "session": "/v1/sessions/demo",
        "generation": "/v1/sessions/demo/generations/gen_w5x2k7q3m4n6p8r2s3t4u5v6y7",
        "cancel": "/v1/sessions/demo/generations/gen_w5x2k7q3m4n6p8r2s3t4u5v6y7/cancel",
    },
}
_REFUSED: Final = ResponseSpec(
    ProblemDetails,
    description="The request cannot be read or is not valid any more",
    media_type="application/problem+json",
)


_Requests = Callable[[Principal], DeadRequests]


def dead_router(intake: Intake, broker: Broker, pool: str) -> Router:
    """Return the routes under ``/v1/requests/dead``."""

    def requests(principal: Principal) -> DeadRequests:
        return DeadRequests(broker, principal, pool)

    handlers = [*_views(requests), *_changes(intake, requests)]
    return Router("/v1/requests/dead", route_handlers=handlers, tags=["dead requests"])


def _views(requests: _Requests) -> list[HTTPRouteHandler]:
    @get(
        "/",
        summary="List requests that no producer could run",
        operation_id="listDeadRequests",
        responses=PROBLEMS | {200: _example(DeadRequestList, {"requests": [_LINE], "next": None})},
        **needs("read"),
    )
    async def list_dead(
        request: HttpRequest[Any, Any, Any],
        limit: Annotated[int, QueryParameter(ge=1, le=_LIMIT)] = 50,
        after: FromQuery[str | None] = None,
    ) -> DeadRequestList:
        found, more = await reach(requests(caller(request)).page(limit, _sequence(after)))
        return DeadRequestList([_line(each) for each in found], str(more) if more else None)

    @get(
        "/{generation:str}",
        summary="A request that no producer could run",
        operation_id="getDeadRequest",
        responses=PROBLEMS | {200: _example(DeadRequestView, _LINE | {"request": _REQUEST, "raw": None})},
        **needs("read"),
    )
    async def get_dead(request: HttpRequest[Any, Any, Any], generation: FromPath[str]) -> DeadRequestView:
        named("generation", generation)
        return _view(await reach(requests(caller(request)).get(generation)))

    return [list_dead, get_dead]


def _changes(intake: Intake, requests: _Requests) -> list[HTTPRouteHandler]:
    @post(
        "/{generation:str}/resend",
        status_code=202,
        summary="Send a dead request again, as a new generation",
        operation_id="resendDeadRequest",
        responses=PROBLEMS | {202: _example(QueuedRequest, _RESENT), 422: _REFUSED},
        **needs("start"),
    )
    async def resend_dead(request: HttpRequest[Any, Any, Any], generation: FromPath[str]) -> Response[QueuedRequest]:
        named("generation", generation)
        principal = caller(request)
        dead = requests(principal)
        again, resent = _again(await reach(dead.get(generation)))
        # The fixed key makes concurrent resends, and a resend repeated after a failed removal, one new generation.
        # No client can send such a key.
        queued = await reach(intake.accept(principal, again.session, resent, f"resend\0{generation}"))
        await reach(dead.drop(generation))
        return accepted(again.session, *queued)

    @delete(
        "/{generation:str}",
        summary="Remove a dead request for good",
        operation_id="dropDeadRequest",
        responses=PROBLEMS,
        **needs("cancel"),
    )
    async def drop_dead(request: HttpRequest[Any, Any, Any], generation: FromPath[str]) -> None:
        named("generation", generation)
        dead = requests(caller(request))
        await reach(dead.get(generation))
        await reach(dead.drop(generation))

    return [resend_dead, drop_dead]


def _example(content: type, value: object) -> ResponseSpec:
    return ResponseSpec(
        content, generate_examples=False, description="Success", examples=[Example(summary="An answer", value=value)]
    )


def _sequence(after: str | None) -> int:
    if after is None:
        return 0
    if not (after.isascii() and after.isdigit() and len(after) <= 18):
        raise Problem(400, f"after={after[:64]!r} is not the `next` of an earlier page")
    return int(after)


def _view(dead: Dead) -> DeadRequestView:
    request = dead.request
    is_shown = request is None and dead.tenant is not None
    return DeadRequestView(
        generation=dead.generation,
        session=request.session if request else None,
        model=request.model if request else None,
        reason=dead.reason,
        died_at=dead.died_at,
        readable=request is not None,
        request=request,
        raw=dead.data.decode(errors="replace") if is_shown else None,
    )


def _line(dead: Dead) -> DeadRequest:
    view = _view(dead)
    return DeadRequest(**{name: getattr(view, name) for name in DeadRequest.__struct_fields__})


def _again(dead: Dead) -> tuple[Request, GenerationRequest]:
    """Return a dead request and the body to send again.

    Raises:
        Problem: 422, the request cannot be decoded or is not valid any more.
    """
    if dead.request is None:
        raise Problem(
            422,
            f"the request of generation {dead.generation!r} cannot be read, so it cannot be sent again: "
            f"{dead.reason or 'no reason was noted'}",
            slug="unreadable-request",
            title="The request cannot be read",
        )
    given = msgspec.to_builtins(dead.request)
    body = {name: given[name] for name in GenerationRequest.__struct_fields__ if name in given}
    try:
        return dead.request, msgspec.convert(body, GenerationRequest)
    except msgspec.ValidationError as error:
        raise Problem(422, f"the request cannot be sent again: {error}") from error
