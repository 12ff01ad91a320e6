"""Describe the events of durable consumers in OpenAPI: raw ASGI handlers have no generated description."""

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

__all__ = ["describe_consumer_events"]

_PATH: Final = "/v1/consumers/{name}/events"
_LINE: Final = (
    '{"token":"k1002d7116420000000000010000000000010000010","session":"demo","cursor":"t1002d71164239697f2300000000000c",'
    '"deliveries":1,"event":{"type":"started","generation":"gen_1","seq":0,"model":"scripted/story"}}'
)
_EXPLANATION: Final = (
    "With `batch`: one JSON response with the available events, or the first ones that arrive within `wait` seconds. "
    "Without it: a stream of server-sent events, or with `Accept: application/x-ndjson` one line per event. Settle "
    "events by their `token`; with `ack=auto` they are acknowledged when they are written."
)


def describe_consumer_events(document: OpenAPI) -> None:
    """Add the path of a consumer's events to ``document``."""
    paths = document.paths = document.paths or {}
    text = Schema(type="string")  # type: ignore[arg-type]  # the enumeration's value works as well
    problem = {"application/problem+json": OpenAPIMediaType()}
    refusals = {
        "400": "A query parameter is not valid",
        "401": "The credentials are missing or not valid",
        "403": "Not allowed",
        "404": "No such consumer",
        "503": "The service is not available now",
    }
    paths[_PATH] = PathItem(
        get=Operation(
            tags=["consumers"],
            operation_id="readConsumer",
            security=[{"credentials": ["consume"]}],
            summary="A durable consumer's events",
            description=_EXPLANATION,
            parameters=[
                Parameter("name", "path", text, required=True),
                Parameter(
                    "batch",
                    "query",
                    _number("integer", 1, 1_000),
                    description="Largest number of events in the response.",
                ),
                Parameter(
                    "wait", "query", _number("number", 0, 30), description="Seconds to wait for the first event."
                ),
                Parameter(
                    "ack",
                    "query",
                    Schema(type="string", enum=["explicit", "auto"]),  # type: ignore[arg-type]
                    description="`explicit`: the client settles events; `auto`: they are acknowledged when written.",
                ),
            ],
            responses={
                "200": OpenAPIResponse(
                    description="The events",
                    content={
                        "application/json": OpenAPIMediaType(schema=Schema(type="object")),  # type: ignore[arg-type]
                        "application/x-ndjson": OpenAPIMediaType(
                            schema=text, examples={"started": Example(summary="An event", value=_LINE + "\n")}
                        ),
                        "text/event-stream": OpenAPIMediaType(
                            schema=text, examples={"started": Example(summary="An event", value=f"data: {_LINE}\n\n")}
                        ),
                    },
                ),
                **{
                    status: OpenAPIResponse(description=meaning, content=problem)
                    for status, meaning in refusals.items()
                },
            },
        )
    )


def _number(kind: str, least: float, most: float) -> Schema:
    return Schema(type=kind, minimum=least, maximum=most)  # type: ignore[arg-type]  # the enumeration's value works
