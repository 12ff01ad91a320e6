"""The HTTP API beside the streams: requests, cancellation, look-ups."""

from typing import Annotated, Any, Final, Literal

import msgspec
from litestar import Request, Response, Router, delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Body, FromPath, FromQuery, HeaderParameter, QueryParameter

from schemas.events import AbandonedCall, type_of
from schemas.requests import GenerationRecord
from services.delivery.errors import Deleted, Unknown
from services.delivery.http.completion import Completion
from services.delivery.http.responses import PROBLEMS, Accepted, accepted, gone, named, own, reach
from services.delivery.requests.answer import AnswerMessage, BinaryContent, ChoiceAnnotation, ChoiceExtra, ToolCallText
from services.delivery.requests.deletion import Deletion
from services.delivery.requests.generations import ENDED, Lookups
from services.delivery.requests.intake import GenerationWish, Intake
from services.delivery.requests.transcript import Alternative, Transcript
from services.kit.auth.rules import caller, needs
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.problem import Problem, ProblemDetails, problem_bytes

__all__ = ["GenerationView", "SessionView", "router", "view_of"]

_KEY_LIMIT: Final = 200
_DELETING: Final = (
    "Removes the session's events, its records, and what was put aside of it; bills stay. Subscribers are told, and "
    "later reads are 410 for as long as the log would have kept the events. Deleting again changes nothing; a deletion "
    "that was interrupted is finished by repeating it. Generations that are queued or running: 409, or with "
    "`cancel=true` they are cancelled first."
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
    """Sessions, the newest change first. ``next``: pass it as ``after`` for the next page."""

    sessions: list[SessionSummary]
    next: str | None = None


class SessionView(msgspec.Struct):
    """A session and its generations, oldest first."""

    session: str
    generations: list[GenerationRecord]


class GenerationView(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A generation with what it has said so far.

    ``counted`` and ``usage`` are those of the call that it ended with; ``abandoned_calls`` are those made before it,
    each with its own.
    ``beginning_expired``: the log no longer keeps its first events; what is shown begins in the middle.
    """

    session: str
    generation: str
    state: str
    model: str = ""
    provider: str = ""
    upstream_model: str = ""
    created_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    finish_reason: str | None = None
    code: str | None = None
    message: str | None = None
    text: str = ""
    choices: list[str] = []
    alternatives: list[Alternative] = []
    reasoning: str = ""
    refusal: str = ""
    tool_calls: list[ToolCallText] = []
    annotations: list[ChoiceAnnotation] = []
    binaries: list[BinaryContent] = []
    extras: list[ChoiceExtra] = []
    messages: list[AnswerMessage] = []
    events: int = 0
    beginning_expired: bool = False
    counted: Any = None
    usage: Any = None
    abandoned_calls: list[AbandonedCall] = []
    metadata: dict[str, str] = {}


class CancelState(msgspec.Struct):
    """What a cancellation found: ``cancelling``, or the terminal state that the generation has already."""

    generation: str
    state: str


def router(intake: Intake, lookups: Lookups, completion: Completion, deletion: Deletion) -> Router:
    """Return the routes of sessions and generations under ``/v1``."""
    return Router(
        "/v1", route_handlers=[*_requests(intake, lookups, completion), *_views(lookups, completion, deletion)]
    )


def _requests(intake: Intake, lookups: Lookups, completion: Completion) -> list[HTTPRouteHandler]:
    @post(
        "/sessions/{session:str}/generations",
        status_code=202,
        summary="Ask a model",
        operation_id="createGeneration",
        responses=PROBLEMS
        | {200: ResponseSpec(GenerationView, description="`wait=complete`: the generation has ended")},
        exception_handlers={UnicodeDecodeError: _unreadable, RecursionError: _unreadable},
        tags=["generations"],
        **needs("start"),
    )
    async def create_generation(
        request: Request[Any, Any, Any],
        session: FromPath[str],
        data: Annotated[GenerationWish, Body(examples=[Example(summary="A question", value=_EXAMPLE)])],
        idempotency_key: Annotated[str | None, HeaderParameter(name="Idempotency-Key", required=False)] = None,
        wait: FromQuery[Literal["complete"] | None] = None,
    ) -> Response[Accepted | GenerationView]:
        principal = caller(request)
        own(principal, session)
        if idempotency_key is not None and not 0 < len(idempotency_key) <= _KEY_LIMIT:
            raise Problem(400, f"Idempotency-Key must have 1 to {_KEY_LIMIT} characters")
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
    """Answer a body that is not UTF-8 or nested without end: the decoder raises no error of its own for those."""
    problem = Problem(400, f"the body is not readable as JSON: {type(error).__name__}")
    return Response(problem_bytes(problem), status_code=400, media_type="application/problem+json")


async def _whole(
    request: Request[Any, Any, Any], lookups: Lookups, completion: Completion, session: str, generation: str
) -> tuple[GenerationView, bool]:
    """Wait for the end of a generation; return it, and whether it has ended within the time there is."""
    principal = caller(request)
    ended = await completion.wait(principal, session, generation, request.receive)
    return await reach(view_of(lookups, principal.tenant, session, generation)), ended


async def view_of(lookups: Lookups, tenant: str, session: str, generation: str) -> GenerationView:
    """Return a generation as look-ups show it.

    Raises:
        Unknown: there is none.
        BrokerUnavailable: the log cannot be read.
    """
    try:
        found = await lookups.get(tenant, session, generation)
    except BrokerUnavailable:
        found = None  # the log is the truth
    said = await lookups.transcript(tenant, session, generation)
    if found is None and not said.events:
        raise Unknown(f"session {session!r} has no generation {generation!r}")
    record = found[0] if found else None
    if record is not None and record.state == "deleted":
        raise Deleted(f"session {session!r} was deleted, and generation {generation!r} with it")
    started, terminal = said.started, said.terminal
    # The log is the truth; of what it no longer keeps, and of the end that its producer noted, the record knows.
    expired = said.headless or not said.events
    noted = record if record is not None and expired and terminal is None else None
    return GenerationView(
        session=session,
        generation=generation,
        state=_state(said, record, expired),
        model=record.model if record else (started.model if started else ""),
        provider=record.provider if record and record.provider else (started.provider if started else ""),
        upstream_model=started.upstream_model if started else (record.upstream_model or "" if record else ""),
        created_at=record.created_at if record else None,
        started_at=started.at if started else (record.started_at if record and expired else None),
        ended_at=terminal.at if terminal else (noted.ended_at if noted else None),
        finish_reason=getattr(terminal, "finish_reason", None) or (noted.finish_reason if noted else None),
        code=getattr(terminal, "code", None) or (noted.code if noted else None),
        message=getattr(terminal, "message", None),
        text=said.text,
        choices=said.choices,
        alternatives=said.alternatives,
        reasoning=said.reasoning,
        refusal=said.refusal,
        tool_calls=said.tool_calls,
        annotations=[annotation for answer in said.answers for annotation in answer.annotations],
        binaries=[binary for answer in said.answers for binary in answer.files()],
        extras=[extra for answer in said.answers for extra in answer.extras],
        messages=said.messages,
        events=said.events,
        beginning_expired=said.headless,
        counted=(noted.counted if noted else None) or said.counted(),
        usage=said.usage or (record.usage if record and expired else None),
        abandoned_calls=said.abandoned_calls,
        metadata=started.metadata if started else (record.metadata if record else {}),
    )


def _state(said: Transcript, record: GenerationRecord | None, expired: bool) -> str:
    if said.terminal is not None:
        return type_of(said.terminal)
    if record is not None and (record.state == "cancelling" or (expired and record.state in ENDED)):
        return record.state
    return "running" if said.events or (record is not None and record.state == "running") else "queued"


def _summaries(records: list[GenerationRecord]) -> list[SessionSummary]:
    found: dict[str, SessionSummary] = {}
    for record in records:
        changed = record.ended_at or record.started_at or record.created_at
        known = found.get(record.session)
        if known is None:
            found[record.session] = SessionSummary(
                record.session, 1, record.state, record.created_at, changed, record.model
            )
            continue
        known.generations += 1
        known.created_at = min(known.created_at, record.created_at)
        if changed >= known.updated_at:
            known.updated_at, known.last_state, known.model = changed, record.state, record.model
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
