"""Serve the HTTP API of durable consumers: create, view, pause, settle, delete; `ConsumerEvents` reads events."""

from collections.abc import Awaitable
from typing import Annotated, Any, Final, TypeVar

from litestar import Request, Response, Router, delete, get, post, put
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import Body, FromPath, FromQuery, QueryParameter
from litestar.types import ASGIApp

from schemas.cursor import Cursor, InvalidCursor
from services.delivery.consumers.access import covers, permitted
from services.delivery.consumers.definition import ConsumerSpec, rfc3339
from services.delivery.consumers.registry import Conflicting, Consumers, Found
from services.delivery.consumers.settling import Settlement, SettlementResult, settle
from services.delivery.consumers.tokens import InvalidToken
from services.delivery.errors import CursorExpired, CursorForeign, TooBusy, named, reach
from services.delivery.http.consumer_events import ConsumerEvents
from services.delivery.http.consumer_views import (
    ConsumerList,
    ConsumerView,
    DeadEventList,
    DeadEventView,
    Pause,
    consumer_view,
    dead_view,
)
from services.delivery.http.responses import PROBLEMS
from services.kit.auth.guards import caller, needs
from services.kit.auth.principal import Principal, authorize
from services.kit.jetstream.errors import APIError
from services.kit.problem import MEDIA_TYPE as PROBLEM_TYPE
from services.kit.problem import Problem, ProblemDetails

__all__ = ["consumers_router"]

T = TypeVar("T")
AnyRequest = Request[Any, Any, Any]
_TAGS: Final = ["consumers"]


def consumers_router(consumers: Consumers, events: ConsumerEvents) -> Router:
    """Return the routes under ``/v1/consumers``."""
    handlers = [*_definitions(consumers), *_pauses(consumers), *_reading(consumers, events), *_dead(consumers)]
    return Router("/v1/consumers", route_handlers=handlers, tags=_TAGS, **needs("consume"))


def _definitions(consumers: Consumers) -> list[HTTPRouteHandler]:
    async def view(principal: Principal, name: str, found: Found) -> ConsumerView:
        return consumer_view(name, found, await reach(consumers.dead.count(principal.tenant, name)))

    @put(
        "/{name:str}",
        summary="Create or change a durable consumer",
        operation_id="putConsumer",
        responses=PROBLEMS
        | {
            201: ResponseSpec(ConsumerView, description="Created"),
            409: ResponseSpec(
                ProblemDetails, description="A fixed field of the consumer cannot be changed", media_type=PROBLEM_TYPE
            ),
            429: ResponseSpec(
                ProblemDetails, description="The tenant has the largest number of consumers", media_type=PROBLEM_TYPE
            ),
        },
    )
    async def put_consumer(
        request: AnyRequest, name: FromPath[str], data: Annotated[ConsumerSpec, Body()]
    ) -> Response[ConsumerView]:
        named("consumer", name)
        principal = caller(request)
        _check(data, principal)
        found, new = await refusing(consumers.put(principal.tenant, name, data))
        shown = await view(principal, name, found)
        return Response(shown, status_code=201 if new else 200, headers={"Location": f"/v1/consumers/{name}"})

    @get("/", summary="List durable consumers", operation_id="listConsumers", responses=PROBLEMS)
    async def list_consumers(request: AnyRequest) -> ConsumerList:
        principal = caller(request)
        each: dict[str, Found] = await reach(consumers.all_of(principal.tenant))
        dead: dict[str, int] = await reach(consumers.dead.counts(principal.tenant))
        seen = {name: found for name, found in each.items() if covers(principal, found.definition.spec.session)}
        return ConsumerList([consumer_view(name, found, dead.get(name, 0)) for name, found in seen.items()])

    @get("/{name:str}", summary="A durable consumer", operation_id="getConsumer", responses=PROBLEMS)
    async def get_consumer(request: AnyRequest, name: FromPath[str]) -> ConsumerView:
        principal = caller(request)
        return await view(principal, name, await permitted(consumers, principal, name))

    @delete("/{name:str}", summary="Remove a durable consumer", operation_id="deleteConsumer", responses=PROBLEMS)
    async def delete_consumer(request: AnyRequest, name: FromPath[str]) -> None:
        principal = caller(request)
        await permitted(consumers, principal, name)
        await reach(consumers.delete(principal.tenant, name))

    return [put_consumer, list_consumers, get_consumer, delete_consumer]


def _check(spec: ConsumerSpec, principal: Principal) -> None:
    if spec.session is not None:
        named("session", spec.session)
        authorize(principal, "consume", spec.session)
    elif not covers(principal, None):
        raise Problem(403, "a consumer of all sessions needs credentials for all of them: name a session")
    if spec.types == ():
        raise Problem(400, "types is empty: leave it out to read all types")
    if spec.after is not None:
        if spec.session is None:
            raise Problem(400, "a cursor is a position in one session: after needs session")
        try:
            Cursor.parse(spec.after)
        except InvalidCursor as error:
            raise Problem(400, str(error), slug="cursor-invalid", title="The cursor is not valid here") from error
    if sum((spec.after is not None, spec.since is not None, spec.start != "start")) > 1:
        raise Problem(400, "start, after and since exclude each other")


async def refusing(call: Awaitable[T]) -> T:
    """Await a change of consumers and map its errors to problem details.

    Raises:
        Problem: 400, 404, 409, 410, 422, 429 or 503.
    """
    try:
        result: T = await reach(call)
    except Conflicting as error:
        raise Problem(409, str(error)) from error
    except TooBusy as error:
        raise Problem(429, str(error), slug="too-many-consumers", title="Too many are kept already") from error
    except CursorForeign as error:
        raise Problem(400, str(error), slug="cursor-invalid", title="The cursor is not valid here") from error
    except CursorExpired as error:
        raise Problem(410, str(error), slug="cursor-expired", title="The cursor has expired") from error
    except APIError as error:
        raise Problem(422, str(error)) from error
    return result


def _pauses(consumers: Consumers) -> list[HTTPRouteHandler]:
    @post(
        "/{name:str}/pause",
        status_code=200,
        summary="Pause a durable consumer",
        operation_id="pauseConsumer",
        responses=PROBLEMS,
    )
    async def pause_consumer(
        request: AnyRequest, name: FromPath[str], data: Annotated[Pause | None, Body()] = None
    ) -> ConsumerView:
        principal = caller(request)
        await permitted(consumers, principal, name)
        found = await reach(consumers.pause(principal.tenant, name, _until(consumers, data)))
        return consumer_view(name, found, await reach(consumers.dead.count(principal.tenant, name)))

    @post(
        "/{name:str}/resume",
        status_code=200,
        summary="Resume a durable consumer",
        operation_id="resumeConsumer",
        responses=PROBLEMS,
    )
    async def resume_consumer(request: AnyRequest, name: FromPath[str]) -> ConsumerView:
        principal = caller(request)
        await permitted(consumers, principal, name)
        found = await reach(consumers.resume(principal.tenant, name))
        return consumer_view(name, found, await reach(consumers.dead.count(principal.tenant, name)))

    return [pause_consumer, resume_consumer]


def _until(consumers: Consumers, pause: Pause | None) -> str | None:
    if pause is None or pause.seconds is None:
        return None
    return rfc3339(consumers.clock.wall() + pause.seconds)


def _reading(consumers: Consumers, events: ConsumerEvents) -> list[HTTPRouteHandler]:

    @get("/{name:str}/events", include_in_schema=False)
    async def consumer_events(request: AnyRequest, name: FromPath[str]) -> ASGIApp:
        return await events.open(request.scope, caller(request), name)

    @post(
        "/{name:str}/acks",
        status_code=200,
        summary="Settle events",
        operation_id="settleEvents",
        responses=PROBLEMS,
    )
    async def settle_events(
        request: AnyRequest, name: FromPath[str], data: Annotated[Settlement, Body()]
    ) -> SettlementResult:
        principal = caller(request)
        await permitted(consumers, principal, name, recent=True)
        try:
            settled: SettlementResult = await reach(settle(consumers, principal.tenant, name, data))
        except InvalidToken as error:
            raise Problem(400, str(error), slug="token-invalid", title="The token is not valid here") from error
        return settled

    return [consumer_events, settle_events]


def _dead(consumers: Consumers) -> list[HTTPRouteHandler]:
    dead = consumers.dead

    @get("/{name:str}/dead", summary="List dead events", operation_id="listDeadEvents", responses=PROBLEMS)
    async def list_dead(
        request: AnyRequest,
        name: FromPath[str],
        limit: Annotated[int, QueryParameter(ge=1, le=200)] = 50,
        after: FromQuery[str | None] = None,
    ) -> DeadEventList:
        principal = caller(request)
        await permitted(consumers, principal, name)
        if after is not None and not (after.isdecimal() and len(after) < 19):
            raise Problem(400, f"after={after[:40]!r} is not the `next` of an earlier page")
        found, more = await reach(dead.page(principal.tenant, name, limit, int(after or 0)))
        return DeadEventList([dead_view(each) for each in found], str(more) if more else None)

    @get("/{name:str}/dead/{event:str}", summary="A dead event", operation_id="getDeadEvent", responses=PROBLEMS)
    async def get_dead(request: AnyRequest, name: FromPath[str], event: FromPath[str]) -> DeadEventView:
        principal = caller(request)
        await permitted(consumers, principal, name)
        named("event", event)
        return dead_view(await reach(dead.get(principal.tenant, name, event)))

    @post(
        "/{name:str}/dead/{event:str}/resend",
        status_code=202,
        summary="Deliver a dead event again",
        operation_id="resendDeadEvent",
        responses=PROBLEMS,
    )
    async def resend_dead(request: AnyRequest, name: FromPath[str], event: FromPath[str]) -> None:
        principal = caller(request)
        await permitted(consumers, principal, name)
        named("event", event)
        await refusing(dead.again(principal.tenant, name, event))

    @delete(
        "/{name:str}/dead/{event:str}", summary="Remove a dead event", operation_id="dropDeadEvent", responses=PROBLEMS
    )
    async def drop_dead(request: AnyRequest, name: FromPath[str], event: FromPath[str]) -> None:
        principal = caller(request)
        await permitted(consumers, principal, name)
        named("event", event)
        await reach(dead.get(principal.tenant, name, event))
        await reach(dead.drop(principal.tenant, name, event))

    return [list_dead, get_dead, resend_dead, drop_dead]
