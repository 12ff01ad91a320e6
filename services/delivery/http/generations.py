"""Serve the HTTP API of sessions and generations: create, cancel, view, list, delete."""

from typing import Annotated, Any, Final, Literal

import msgspec
from litestar import Request, Response, Router, delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Body, FromPath, FromQuery, HeaderParameter, QueryParameter

from schemas.requests import GenerationRecord
from services.delivery.errors import gone, named, reach
from services.delivery.fanout.streams import ReadOptions
from services.delivery.http.completion import Completion
from services.delivery.http.events import SessionEvents, start_form
from services.delivery.http.responses import PROBLEMS, QueuedRequest, StreamedResponse, accepted, own
from services.delivery.requests.deletion import Deletion
from services.delivery.requests.generations import Lookups
from services.delivery.requests.intake import GenerationRequest, Intake
from services.delivery.requests.views import GenerationView, view_of
from services.kit.auth.guards import caller, needs
from services.kit.problem import Problem, ProblemDetails, problem_bytes

__all__ = ["SessionView", "router"]

_KEY_LIMIT: Final = 200
_DELETING: Final = (
    "Removes the session's events, its records, its dead events and requests; bills stay. Subscribers are notified. "
    "Later reads are 410 for as long as the log would have kept the events. Deleting again changes nothing; repeat "
    "an interrupted deletion to finish it. With queued or running generations: 409, or with `cancel=true` they are "
    "cancelled first."
)
_IN_USE: Final = ResponseSpec(
    ProblemDetails, description="Generations have not ended", media_type="application/problem+json"
)
_EXAMPLE: Final = {
    "model": "scripted/story",
    "messages": [{"role": "user", "content": "Tell me about rivers"}],
    "metadata": {"user": "u-17"},
}


class SessionSummary(msgspec.Struct):
    """One line of the list of sessions. Times in seconds since 1970."""

    session: str
    generations: int
    last_state: str
    created_at: float
    updated_at: float
    model: str


class SessionList(msgspec.Struct):
    """Sessions, most recently changed first. ``next``: pass it as ``after`` for the next page."""

    sessions: list[SessionSummary]
    next: str | None = None


class SessionView(msgspec.Struct):
    """A session and its generations, oldest first."""

    session: str
    generations: list[GenerationRecord]


class CancelState(msgspec.Struct):
    """State after a cancellation: ``cancelling``, or the terminal state of a generation that had ended."""

    generation: str
    state: str


def router(
    intake: Intake, lookups: Lookups, events: SessionEvents, completion: Completion, deletion: Deletion
) -> Router:
    """Return the routes of sessions and generations under ``/v1``."""
    return Router(
        "/v1", route_handlers=[*_requests(intake, lookups, events, completion), *_views(lookups, completion, deletion)]
    )


def _requests(
    intake: Intake, lookups: Lookups, events: SessionEvents, completion: Completion
) -> list[HTTPRouteHandler]:
    @post(
        "/sessions/{session:str}/generations",
        status_code=202,
        summary="Start a generation",
        operation_id="createGeneration",
        responses=PROBLEMS
        | {
            200: ResponseSpec(
                GenerationView,
                description="`wait=complete`: the generation has ended. With `Accept: text/event-stream` or "
                "`application/x-ndjson` the answer is the stream of the generation; the headers `Tailrace-Generation` "
                "and `Tailrace-Cursor` name it and the cursor before it.",
            )
        },
        exception_handlers={UnicodeDecodeError: _unreadable, RecursionError: _unreadable},
        tags=["generations"],
        **needs("start"),
    )
    async def create_generation(
        request: Request[Any, Any, Any],
        session: FromPath[str],
        data: Annotated[GenerationRequest, Body(examples=[Example(summary="A question", value=_EXAMPLE)])],
        idempotency_key: Annotated[str | None, HeaderParameter(name="Idempotency-Key", required=False)] = None,
        wait: FromQuery[Literal["complete"] | None] = None,
        granularity: FromQuery[str | None] = None,
        coalesce: FromQuery[int | None] = None,
    ) -> Response[QueuedRequest | GenerationView]:
        principal = caller(request)
        own(principal, session)
        if idempotency_key is not None and not 0 < len(idempotency_key) <= _KEY_LIMIT:
            raise Problem(400, f"Idempotency-Key must have 1 to {_KEY_LIMIT} characters")
        form = start_form(request.scope)
        if form is not None:
            if wait is not None:
                raise Problem(400, "wait=complete is answered as JSON: accept application/json, or leave wait out")
            options = ReadOptions.read(session, from_="start", granularity=granularity, coalesce=coalesce)
            events.check(principal, session)
            accept = intake.accept(principal, session, data, idempotency_key)
            return StreamedResponse(await events.of_start(request.scope, session, form, options, accept))
        if granularity is not None or coalesce is not None:
            raise Problem(400, "granularity and coalesce shape a stream: accept text/event-stream or NDJSON")
        found = await reach(intake.accept(principal, session, data, idempotency_key))
        answer = accepted(session, *found)
        if wait is None:
            return Response(answer.content, status_code=answer.status_code, headers=answer.headers)
        headers = {name: str(value) for name, value in answer.headers.items()}
        view, ended = await _whole(request, lookups, completion, session, found[0])
        return Response(view, status_code=200 if ended else 202, headers=headers)

    @post(
        "/sessions/{session:str}/generations/{generation:str}/cancel",
        status_code=202,
        summary="Cancel a generation",
        operation_id="cancelGeneration",
        responses=PROBLEMS,
        tags=["generations"],
        **needs("cancel"),
    )
    async def cancel_generation(
        request: Request[Any, Any, Any], session: FromPath[str], generation: FromPath[str]
    ) -> Response[CancelState]:
        principal = caller(request)
        own(principal, session)
        named("generation", generation)
        state = await reach(intake.cancel(principal.tenant, session, generation))
        return Response(CancelState(generation, state), status_code=202 if state == "cancelling" else 200)

    return [create_generation, cancel_generation]


def _views(lookups: Lookups, completion: Completion, deletion: Deletion) -> list[HTTPRouteHandler]:
    @get(
        "/sessions",
        summary="List sessions",
        operation_id="listSessions",
        responses=PROBLEMS,
        tags=["sessions"],
        **needs("read"),
    )
    async def list_sessions(
        request: Request[Any, Any, Any],
        limit: Annotated[int, QueryParameter(ge=1, le=1_000)] = 100,
        after: FromQuery[str | None] = None,
    ) -> SessionList:
        principal = caller(request)
        records = [r for r in await reach(lookups.recent(principal.tenant)) if principal.reaches(r.session)]
        return _page(_summaries(records), limit, after)

    @get(
        "/sessions/{session:str}",
        summary="A session and its generations",
        operation_id="getSession",
        responses=PROBLEMS,
        tags=["sessions"],
        **needs("read"),
    )
    async def get_session(request: Request[Any, Any, Any], session: FromPath[str]) -> SessionView:
        principal = caller(request)
        records = await reach(lookups.of_session(principal.tenant, own(principal, session)))
        if not records:
            if await reach(lookups.deletion(principal.tenant, session)) is not None:
                raise gone(f"session {session!r} was deleted")
            raise Problem(404, f"there is no session {session!r}")
        return SessionView(session, sorted(records, key=lambda r: r.created_at))

    @delete(
        "/sessions/{session:str}",
        summary="Delete a session",
        operation_id="deleteSession",
        description=_DELETING,
        responses=PROBLEMS | {409: _IN_USE},
        tags=["sessions"],
        **needs("admin"),
    )
    async def delete_session(
        request: Request[Any, Any, Any], session: FromPath[str], cancel: FromQuery[bool] = False
    ) -> None:
        tenant = caller(request).tenant
        await reach(deletion.delete(tenant, own(caller(request), session), cancel=cancel))

    @get(
        "/sessions/{session:str}/generations/{generation:str}",
        summary="A generation: state, text so far, usage",
        operation_id="getGeneration",
        responses=PROBLEMS | {202: ResponseSpec(GenerationView, description="`wait=complete`: it has not ended yet")},
        tags=["generations"],
        **needs("read"),
    )
    async def get_generation(
        request: Request[Any, Any, Any],
        session: FromPath[str],
        generation: FromPath[str],
        wait: FromQuery[Literal["complete"] | None] = None,
    ) -> Response[GenerationView]:
        principal = caller(request)
        own(principal, session)
        named("generation", generation)
        if wait is not None:
            whole, ended = await _whole(request, lookups, completion, session, generation)
            return Response(whole, status_code=200 if ended else 202)
        return Response(await reach(view_of(lookups, principal.tenant, session, generation)))

    return [list_sessions, get_session, delete_session, get_generation]


def _unreadable(_request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Return 400 for a body that is not UTF-8 or nested too deeply: the decoder has no error type for these."""
    problem = Problem(400, f"the body is not readable as JSON: {type(error).__name__}")
    return Response(problem_bytes(problem), status_code=400, media_type="application/problem+json")


async def _whole(
    request: Request[Any, Any, Any], lookups: Lookups, completion: Completion, session: str, generation: str
) -> tuple[GenerationView, bool]:
    """Wait for the end of a generation; return its view and whether it ended within the longest wait."""
    principal = caller(request)
    ended = await completion.wait(principal, session, generation, request.receive)
    return await reach(view_of(lookups, principal.tenant, session, generation)), ended


def _summaries(records: list[GenerationRecord]) -> list[SessionSummary]:
    found: dict[str, SessionSummary] = {}
    for record in records:
        changed = record.ended_at or record.started_at or record.created_at
        summary = found.get(record.session)
        if summary is None:
            found[record.session] = SessionSummary(
                record.session, 1, record.state, record.created_at, changed, record.model
            )
            continue
        summary.generations += 1
        summary.created_at = min(summary.created_at, record.created_at)
        if changed >= summary.updated_at:
            summary.updated_at, summary.last_state, summary.model = changed, record.state, record.model
    return sorted(found.values(), key=lambda s: (-s.updated_at, s.session))


def _page(summaries: list[SessionSummary], limit: int, after: str | None) -> SessionList:
    start = 0
    if after is not None:
        names = [s.session for s in summaries]
        if after not in names:
            raise Problem(400, f"after={after[:64]!r} is not a session of this list")
        start = names.index(after) + 1
    page = summaries[start : start + limit]
    more = start + limit < len(summaries)
    return SessionList(page, page[-1].session if more and page else None)
