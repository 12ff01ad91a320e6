"""Describe the event streams in OpenAPI: raw ASGI handlers have no generated description."""

from typing import Any, Final

from litestar.openapi.spec import (
    Example,
    OpenAPI,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    PathItem,
    RequestBody,
    Schema,
)

from services.delivery.formats.granularity import COALESCE_STEPS
from services.delivery.formats.multi_cursor import MAX_SESSIONS
from services.delivery.http.long_poll import MAX_EVENTS

__all__ = ["describe_streams"]

_SAMPLE: Final = (
    "retry: 1000\n\n"
    'id: t1002d71164239697f2300000000000c\ndata: {"type":"delta","text":"Hel","tokens":1,"generation":"gen_1","seq":1,'
    '"at":1790000000.5}\n\n'
)
_LINE: Final = (
    '{"cursor":"t1002d71164239697f2300000000000c","event":{"type":"delta","text":"Hel","generation":"gen_1","seq":1}}\n'
)
_TEXT: Final = Schema(type=OpenAPIType.STRING)
_WAIT: Final = Schema(
    one_of=[Schema(type=OpenAPIType.NUMBER, minimum=0), Schema(type=OpenAPIType.STRING, enum=["complete"])]
)
_AFTER: Final = ("after", _TEXT, "A cursor: continue after it.")
_FROM: Final = (
    "from",
    Schema(type=OpenAPIType.STRING, enum=["start", "live"]),
    "Where to begin without a cursor; by default at the running or latest generation.",
)
_GRANULARITY: Final = (
    "granularity",
    Schema(type=OpenAPIType.STRING, enum=["token", "line", "sentence"]),
    "Unit of text deltas; excludes `coalesce`.",
)
_COALESCE: Final = (
    "coalesce",
    Schema(type=OpenAPIType.INTEGER, minimum=COALESCE_STEPS[0], maximum=COALESCE_STEPS[-1]),
    "Join text deltas over this number of milliseconds.",
)
_OF_SESSION: Final = (
    _AFTER,
    _FROM,
    ("generation", _TEXT, "Only this generation."),
    _GRANULARITY,
    _COALESCE,
    ("wait", _WAIT, "Respond with one batch: wait this number of seconds for it, or for the end of `generation`."),
    (
        "limit",
        Schema(type=OpenAPIType.INTEGER, minimum=1, maximum=MAX_EVENTS),
        "Largest number of events of the log in a batch.",
    ),
)
_OF_SEVERAL: Final = (_AFTER, _FROM, _GRANULARITY, _COALESCE)
_SESSIONS: Final = Schema(type=OpenAPIType.ARRAY, items=_TEXT, min_items=1, max_items=MAX_SESSIONS, unique_items=True)
_LAST: Final = Parameter("Last-Event-ID", "header", _TEXT, description="A cursor; wins over `after`.")
_DESCRIPTION: Final = (
    "Replays from the log and continues live, without gap or repeat. Each event's `id` is a cursor: send it back as "
    "`Last-Event-ID` or `after` to continue after it. With `generation` the stream ends after the terminal event of "
    "that generation. Named events `gap` and `bye` concern the stream itself. `Accept` selects the format."
)
_OF_MANY: Final = (
    f"One stream of up to {MAX_SESSIONS} sessions. Each message names its session; its `id` is a cursor with the "
    "positions in all sessions."
)


def describe_streams(document: OpenAPI) -> None:
    """Add the paths of events to ``document``."""
    _loosen_choices(document)
    paths = document.paths = document.paths or {}
    name = Parameter("session", "path", _TEXT, required=True)
    paths["/v1/sessions/{session}/events"] = PathItem(
        get=_operation("streamSessionEvents", "A session's events", _DESCRIPTION, [name, *_query(_OF_SESSION), _LAST]),
        post=_operation(
            "askForSessionEvents",
            "The same, with the options in a body",
            _DESCRIPTION,
            [name, _LAST],
            _body(_OF_SESSION),
        ),
    )
    several = Parameter("session", "query", _SESSIONS, required=True, explode=True)
    sessions = ("sessions", _SESSIONS, "Their names.")
    paths["/v1/events"] = PathItem(
        get=_operation(
            "streamEvents",
            "The events of several sessions",
            _OF_MANY,
            [several, *_query(_OF_SEVERAL), _LAST],
            json=False,
        ),
        post=_operation(
            "askForEvents",
            "The same, with the options in a body",
            _OF_MANY,
            [_LAST],
            _body((sessions, *_OF_SEVERAL)),
            json=False,
        ),
    )


def _operation(
    name: str,
    summary: str,
    description: str,
    parameters: list[Parameter],
    body: RequestBody | None = None,
    *,
    json: bool = True,
) -> Operation:
    content = {
        "text/event-stream": OpenAPIMediaType(
            schema=_TEXT, examples={"delta": Example(summary="A delta", value=_SAMPLE)}
        ),
        "application/x-ndjson": OpenAPIMediaType(
            schema=_TEXT, examples={"delta": Example(summary="A delta", value=_LINE)}
        ),
    }
    if json:
        content["application/json"] = OpenAPIMediaType(schema=Schema(type=OpenAPIType.OBJECT))
    return Operation(
        tags=["events"],
        operation_id=name,
        security=[{"credentials": ["read"]}],
        summary=summary,
        description=description,
        parameters=list(parameters),
        request_body=body,
        responses={"200": OpenAPIResponse(description="The events", content=content), **_refusals(json)},
    )


def _refusals(json: bool) -> dict[str, OpenAPIResponse]:
    problem = {"application/problem+json": OpenAPIMediaType()}
    found = {
        "400": OpenAPIResponse(
            description="The request is not valid, or the cursor belongs to another session", content=problem
        ),
        "404": OpenAPIResponse(description="No such generation", content=problem),
        "406": OpenAPIResponse(description="No format matches `Accept`", content=problem),
        "503": OpenAPIResponse(description="The service is not available now", content=problem),
    }
    if json:
        found["202"] = OpenAPIResponse(
            description="`wait=complete`: the generation has not ended yet",
            content={"application/json": OpenAPIMediaType(schema=Schema(type=OpenAPIType.OBJECT))},
        )
        found["204"] = OpenAPIResponse(description="All of the generation has been read: do not reconnect.")
        found["410"] = OpenAPIResponse(description="The cursor has expired", content=problem)
    return found


def _query(fields: tuple[tuple[str, Schema, str], ...]) -> list[Parameter]:
    return [Parameter(name, "query", schema, description=text) for name, schema, text in fields]


def _body(fields: tuple[tuple[str, Schema, str], ...]) -> RequestBody:
    properties: dict[str, Any] = {name: schema for name, schema, _ in fields}
    schema = Schema(type=OpenAPIType.OBJECT, properties=properties, additional_properties=False)
    return RequestBody(content={"application/json": OpenAPIMediaType(schema=schema)})


def _loosen_choices(document: OpenAPI) -> None:
    """Replace ``oneOf`` by ``anyOf`` in responses: one value can match several of the schemas."""
    for item in (document.paths or {}).values():
        for operation in (item.get, item.post, item.put):
            for response in ((operation.responses or {}) if operation else {}).values():
                for media in (getattr(response, "content", None) or {}).values():
                    if isinstance(media.schema, Schema) and media.schema.one_of:
                        media.schema.any_of, media.schema.one_of = media.schema.one_of, None
