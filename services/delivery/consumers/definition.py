"""Define durable consumers and derive the settings of the broker's consumers. Pure."""

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec

from schemas.cursor import Cursor, CursorIssuer
from schemas.names import check_name
from schemas.subjects import consumer_filter, log_filter
from schemas.topology import CONSUMERS, service_durable, token_stream
from services.kit.jetstream.consumer import DurableInfo

__all__ = [
    "AGAIN",
    "Definition",
    "EventType",
    "ConsumerSpec",
    "changed",
    "definition_of",
    "durable_config",
    "event_filter",
    "first_position",
    "incarnation",
    "later_position",
    "log_of",
    "resumed_position",
    "rfc3339",
    "seconds",
    "stream_of",
]

AGAIN: Final = -1
"""Pseudo partition of the dead events that are queued for redelivery."""
_KEY: Final = "tailrace.consumer"
_LOG: Final = "tailrace.log"

EventType = Literal[
    "started", "delta", "notice", "restarted", "usage", "completed", "failed", "cancelled", "interrupted"
]


class ConsumerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a durable consumer. Times in seconds.

    ``session``: the only session to read; without it all sessions of the tenant. ``types``: the only event types to
    deliver; without it all types. Start position, one of: ``start`` of the kept log, or ``new``; after the cursor
    ``after`` of the session; at the time ``since`` (seconds since 1970). ``ack_wait``: time until an event that is not
    acknowledged is delivered again. ``max_in_flight``: most events delivered and not acknowledged. ``max_deliver``:
    deliveries of one event before it becomes a dead event.
    """

    session: str | None = None
    types: tuple[EventType, ...] | None = None
    start: Literal["start", "new"] = "start"
    after: str | None = None
    since: Annotated[float, msgspec.Meta(ge=0, le=253_402_300_799)] | None = None
    ack_wait: Annotated[float, msgspec.Meta(ge=0.1, le=3_600)] = 30.0
    max_in_flight: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1_000
    max_deliver: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 5


class Definition(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A durable consumer, as stored in the metadata of each of its broker's consumers.

    ``revision`` grows with every change; the highest one is valid. ``deleted``: the consumer is being removed; a
    broker's consumer with this mark is left over from an interrupted removal.
    """

    spec: ConsumerSpec
    revision: int = 1
    deleted: bool = False


def changed(definition: Definition, spec: ConsumerSpec) -> tuple[str, ...]:
    """Return the fixed fields in which ``spec`` differs from a definition."""
    fixed = ("session", "start", "after", "since")
    return tuple(name for name in fixed if getattr(definition.spec, name) != getattr(spec, name))


def definition_of(info: DurableInfo) -> Definition | None:
    """Return the definition stored in a broker's consumer, or None when it is missing or cannot be decoded."""
    text = (info.config.get("metadata") or {}).get(_KEY)
    try:
        return msgspec.json.decode(text, type=Definition) if text else None
    except msgspec.DecodeError:
        return None


def log_of(info: DurableInfo) -> str:
    """Return the incarnation of the log to which the position of a broker's consumer belongs."""
    return str((info.config.get("metadata") or {}).get(_LOG, ""))


def stream_of(partition: int) -> str:
    """Return the stream of a partition's events, or of the events to redeliver for `AGAIN`."""
    return CONSUMERS if partition == AGAIN else token_stream(partition)


def event_filter(tenant: str, name: str, partition: int, session: str | None) -> str:
    """Return the subject filter of a consumer in a partition.

    Raises:
        InvalidName: a name is not valid in a subject.
    """
    if partition == AGAIN:
        return consumer_filter("again", tenant, name)
    if session is not None:
        return log_filter(partition, tenant, session)
    return f"tokens.{partition}.{check_name('tenant', tenant)}.*.*"


def durable_config(
    tenant: str, name: str, definition: Definition, partition: int, partitions: int, inactive: float, log: str = ""
) -> dict[str, Any]:
    """Return the settings of the broker's consumer of one partition, without its start position.

    Each of ``partitions`` gets an equal share of ``max_in_flight``, at least one. ``inactive``: seconds without a
    reader after which the broker removes the consumer (0: never). ``log``: the incarnation of the log that it reads.
    """
    spec = definition.spec
    config: dict[str, Any] = {
        "name": service_durable(tenant, name),
        "durable_name": service_durable(tenant, name),
        "filter_subject": event_filter(tenant, name, partition, spec.session),
        "ack_policy": "explicit",
        "ack_wait": round(spec.ack_wait * 1e9),
        "max_ack_pending": -(-spec.max_in_flight // max(1, partitions)),
        "max_deliver": -1,
        "metadata": {_KEY: msgspec.json.encode(definition).decode(), _LOG: log},
    }
    if inactive > 0:
        config["inactive_threshold"] = round(inactive * 1e9)
    return config


def first_position(spec: ConsumerSpec, partition: int) -> dict[str, Any]:
    """Return the start position in a partition that exists when the consumer is created."""
    if partition == AGAIN:
        return {"deliver_policy": "all"}
    if spec.after is not None:
        cursor = Cursor.parse(spec.after)
        if cursor.partition == partition:
            return {"deliver_policy": "by_start_sequence", "opt_start_seq": cursor.seq + 1}
        return {"deliver_policy": "all"}  # the session is not here now; its later events follow the cursor
    if spec.since is not None:
        return {"deliver_policy": "by_start_time", "opt_start_time": rfc3339(spec.since)}
    return {"deliver_policy": "new" if spec.start == "new" else "all"}


def resumed_position(info: DurableInfo, base: int) -> dict[str, Any] | None:
    """Return the new start position of a consumer whose log has lost its end, or None when its position is valid.

    ``base``: last stream sequence that the log still holds unchanged. For a position beyond it, the broker would skip
    all new events up to that position.
    """
    if info.delivered.stream_seq <= base:
        return None
    return {"deliver_policy": "by_start_sequence", "opt_start_seq": min(info.ack_floor.stream_seq, base) + 1}


def later_position(spec: ConsumerSpec, partition: int, log: str, created: str) -> dict[str, Any]:
    """Return the start position in a partition that was added or re-created after the consumer was created.

    ``log``: the incarnation of the partition's log; ``created``: creation time of the consumer by the broker's clock.
    """
    if partition == AGAIN or spec.since is not None:
        return first_position(spec, partition)
    if spec.after is not None and Cursor.parse(spec.after).incarnation != incarnation(log):
        return {"deliver_policy": "all"}
    if spec.after is None and spec.start == "new":
        return {"deliver_policy": "by_start_time", "opt_start_time": created}
    return first_position(spec, partition)


def rfc3339(moment: float) -> str:
    """Format seconds since 1970 as an RFC 3339 time, as the broker reads it."""
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")


def seconds(created: str) -> float:
    """Parse a time of the broker; return seconds since 1970."""
    return datetime.fromisoformat(created).timestamp()


def incarnation(log: str) -> str:
    """Return the short form of a log's incarnation that cursors contain."""
    return CursorIssuer(0, log, "", "").incarnation
