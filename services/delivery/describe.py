"""Adds the streams to the OpenAPI document: raw ASGI handlers do not describe themselves."""

from typing import Final

from litestar.openapi.spec import (
    Example,
    OpenAPI,
    OpenAPIMediaType,
    OpenAPIResponse,
    Operation,
    Parameter,
    PathItem,
    Schema,
)

__all__ = ["describe_streams"]

_PATH: Final = "/v1/sessions/{session}/events"
_SAMPLE: Final = (
    "retry: 1000\n\n"
    'id: t1002d71164239697f2300000000000c\ndata: {"type":"delta","text":"Hel","tokens":1,"generation":"gen_1","seq":1,'
    '"at":1790000000.5}\n\n'
)


def describe_streams(document: OpenAPI) -> None:
    """Add the path of the session's events."""
    paths = document.paths = document.paths or {}
    text = Schema(type="string")  # type: ignore[arg-type]  # the enumeration's value works as well
    problem = {"application/problem+json": OpenAPIMediaType()}
    paths[_PATH] = PathItem(
        get=Operation(
            tags=["events"],
            operation_id="streamSessionEvents",
            security=[{"credentials": ["read"]}],
            summary="A session's events as server-sent events",
            description=(
                "Replays from the log and goes on live, without gap or repeat. Each event's `id` is a cursor: send it "
                "back as `Last-Event-ID` or `after` to go on behind it. With `generation` the stream ends after the "
                "terminal of that generation. Named events `gap` and `bye` concern the stream itself."
            ),
            parameters=[
                Parameter("session", "path", text, required=True),
                Parameter("after", "query", text, description="A cursor: read on behind it."),
                Parameter(
                    "from",
                    "query",
                    Schema(type="string", enum=["start", "live"]),  # type: ignore[arg-type]
                    description="Where to begin without a cursor; by default at the running or latest generation.",
                ),
                Parameter("generation", "query", text, description="Only this generation."),
                Parameter("Last-Event-ID", "header", text, description="A cursor; wins over `after`."),
            ],
            responses={
                "200": OpenAPIResponse(
                    description="The stream",
                    content={
                        "text/event-stream": OpenAPIMediaType(
                            schema=text, examples={"delta": Example(summary="A delta", value=_SAMPLE)}
                        )
                    },
                ),
                "204": OpenAPIResponse(description="All of the generation has been read: do not reconnect."),
                "400": OpenAPIResponse(description="Not valid, or a cursor of another session", content=problem),
                "404": OpenAPIResponse(description="No such generation", content=problem),
                "410": OpenAPIResponse(description="The cursor has expired", content=problem),
                "503": OpenAPIResponse(description="Not available at the moment", content=problem),
            },
        )
    )
