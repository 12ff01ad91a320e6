"""Build the AsyncAPI document of the subjects: channels, operations and messages."""

import inspect
from typing import Any, Final, get_args

from schemas.delivered import DeliveredReport
from schemas.events import VERSION, AnyEvent, Event
from schemas.names import NAME_PATTERN
from schemas.requests import DeletedSession, Request

__all__ = ["asyncapi"]

_EVENTS: Final[dict[str, type[Event]]] = {t.__struct_config__.tag: t for t in get_args(AnyEvent)}
_TYPES: Final = {**_EVENTS, "request": Request, "delivered_report": DeliveredReport, "deleted_session": DeletedSession}
_RECORDS: Final = ("request", "delivered_report", "deleted_session")
_EVENT_TAGS: Final = tuple(sorted(_EVENTS))
_NAME: Final = f"One subject token: {NAME_PATTERN}"
_PARAMETERS: Final = {
    "partition": "Stable hash of tenant and session modulo the number of partitions: 0 to 255.",
    "tenant": f"The owner of the session. {_NAME}",
    "session": f"The ordered log that clients subscribe to. {_NAME}",
    "generation": f"One answer of one model. {_NAME}",
    "pool": f"The producers that share a work queue. {_NAME}",
}
_CHANNELS: Final = {
    "tokens": (
        "tokens.{partition}.{tenant}.{session}.{generation}",
        "The log: every event of a generation, kept in the stream TOKENS_<partition>."
        " Readers apply the acceptance rule.",
        _EVENT_TAGS,
    ),
    "live": (
        "live.{partition}.{tenant}.{session}.{generation}",
        "The tail of the log: each stored event is republished here unchanged. The headers Nats-Sequence and"
        " Nats-Last-Sequence (the previous one on the same subject) reveal a missed message.",
        _EVENT_TAGS,
    ),
    "requests": ("requests.{pool}.{generation}", "The work queue: requests that wait for a producer.", ("request",)),
    "dead": ("dead.{pool}.{generation}", "Requests that no producer could run, kept for inspection.", ("request",)),
    "delivered": (
        "delivered.{tenant}.{session}.{generation}",
        "Delivery's reports of the events sent of a generation, kept for billing. Each report is cumulative.",
        ("delivered_report",),
    ),
    "control": (
        "control.{tenant}.{session}.{generation}",
        "Control messages to the producer that runs a generation. It answers `ok`; no responders: no producer runs it.",
        ("cancel", "ok"),
    ),
    "presence": (
        "presence.{tenant}.{session}.{generation}",
        "Interest in this subject shows that the generation has a subscriber. An empty request is sent here; no"
        " responders: it has none.",
        ("empty",),
    ),
    "deleted": (
        "deleted.{tenant}.{session}",
        "A replica of delivery has deleted a session: the others end the streams of its readers.",
        ("deleted_session",),
    ),
}
_OPERATIONS: Final = {
    "appendEvent": ("send", "tokens", "A producer appends an event to the log."),
    "readLog": ("receive", "tokens", "A reader reads the log back."),
    "followLive": ("receive", "live", "A reader follows the log as it grows."),
    "queueRequest": ("send", "requests", "Delivery queues a request for a generation."),
    "takeRequest": ("receive", "requests", "A producer takes a request; redelivery is its lease."),
    "buryRequest": ("send", "dead", "A producer stores a dead request, which cannot run."),
    "inspectRequest": ("receive", "dead", "Dead requests are shown, sent again as new requests, or removed."),
    "reportDelivered": ("send", "delivered", "Delivery reports the events that it has sent."),
    "settleDelivered": ("receive", "delivered", "Billing reads the reports."),
    "cancel": ("send", "control", "A running generation is cancelled."),
    "askForListeners": ("send", "presence", "A producer asks whether a generation has subscribers."),
    "announceDeletion": ("send", "deleted", "A replica of delivery announces a deleted session."),
    "hearDeletion": ("receive", "deleted", "The other replicas end the streams of the session's readers."),
}
_PLAIN: Final = {
    "cancel": ("Stop the generation.", {"type": "string", "const": "cancel"}),
    "ok": ("The message was received.", {"type": "string", "const": "ok"}),
    "empty": ("No content.", {"type": "string", "maxLength": 0}),
}


def asyncapi() -> dict[str, Any]:
    """Return the document (AsyncAPI 3.0); it refers to the JSON Schemas in ``./json``."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Tailrace on NATS",
            "version": str(VERSION),
            "description": "The subjects and messages with which Tailrace's services communicate.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {name: _channel(*channel) for name, channel in _CHANNELS.items()},
        "operations": {name: _operation(*operation) for name, operation in _OPERATIONS.items()},
        "components": {
            "messages": {
                name: _message(name)
                for name in (*_EVENT_TAGS, "request", "delivered_report", "deleted_session", *_PLAIN)
            },
            "parameters": {name: {"description": text} for name, text in _PARAMETERS.items()},
        },
    }


def _channel(address: str, description: str, messages: tuple[str, ...]) -> dict[str, Any]:
    parameters = [name for name in _PARAMETERS if f"{{{name}}}" in address]
    return {
        "address": address,
        "description": description,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
        "parameters": {name: {"$ref": f"#/components/parameters/{name}"} for name in parameters},
    }


def _operation(action: str, channel: str, summary: str) -> dict[str, Any]:
    operation: dict[str, Any] = {"action": action, "channel": {"$ref": f"#/channels/{channel}"}, "summary": summary}
    if channel == "control":
        here = f"#/channels/{channel}"
        operation["messages"] = [{"$ref": f"{here}/messages/cancel"}]
        operation["reply"] = {"channel": {"$ref": here}, "messages": [{"$ref": f"{here}/messages/ok"}]}
    return operation


def _message(name: str) -> dict[str, Any]:
    if name in _PLAIN:
        summary, payload = _PLAIN[name]
        return {"name": name, "summary": summary, "contentType": "text/plain", "payload": payload}
    summary = (inspect.getdoc(_TYPES[name]) or name).splitlines()[0]
    return {"name": name, "summary": summary, "payload": {"$ref": f"./json/{name}.json"}}
