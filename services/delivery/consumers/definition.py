"""What a durable consumer is to read and how, and the broker's consumers that follow from it. Pure."""

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
"""Stands for a partition where it is about the events that a consumer is to be given again."""
_KEY: Final = "tailrace.consumer"
_LOG: Final = "tailrace.log"

EventType = Literal[
    "started", "delta", "notice", "restarted", "usage", "completed", "failed", "cancelled", "interrupted"
]


class ConsumerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a service asks for. Times in seconds.

    ``session``: the only one to read; all of the tenant's without it. ``types``: the only types of events to give; all
    without it. Where to begin, once: ``start`` of what the log keeps, or ``new``; or behind the cursor ``after`` of the
    session; or at the time ``since`` (seconds since 1970). ``ack_wait``: how long after it was given an event that is
    not acknowledged is given again. ``max_in_flight``: events given and not acknowledged. ``max_deliver``: how often
    one is given before it is put aside as dead.
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
    """A consumer as it is kept beside each of the broker's consumers that belong to it.

    ``revision`` grows with every change: the greatest one holds. ``deleted``: it is being removed, and a consumer that
    still has this is what a removal left behind.
    """

    spec: ConsumerSpec
    revision: int = 1
    deleted: bool = False


def changed(definition: Definition, spec: ConsumerSpec) -> tuple[str, ...]:
    """Return the fields in which a wish differs from a definition and that cannot be changed afterwards."""
    fixed = ("session", "start", "after", "since")
    return tuple(name for name in fixed if getattr(definition.spec, name) != getattr(spec, name))


def definition_of(info: DurableInfo) -> Definition | None:
    """Return the definition kept beside one of the broker's consumers; ``None`` where there is none to be read."""
    text = (info.config.get("metadata") or {}).get(_KEY)
    try:
        return msgspec.json.decode(text, type=Definition) if text else None
    except msgspec.DecodeError:
        return None


def log_of(info: DurableInfo) -> str:
    """Return the incarnation of the log in which one of the broker's consumers has its position."""
    return str((info.config.get("metadata") or {}).get(_LOG, ""))


def stream_of(partition: int) -> str:
    """Return the stream that keeps a partition's events, or those to be given `AGAIN`."""
    return CONSUMERS if partition == AGAIN else token_stream(partition)


def event_filter(tenant: str, name: str, partition: int, session: str | None) -> str:
    """Return the filter of the events that a consumer reads of a partition.

    Raises:
        InvalidName: a name cannot stand in a subject.
    """
    if partition == AGAIN:
        return consumer_filter("again", tenant, name)
    if session is not None:
        return log_filter(partition, tenant, session)
    return f"tokens.{partition}.{check_name('tenant', tenant)}.*.*"


def durable_config(
    tenant: str, name: str, definition: Definition, partition: int, partitions: int, inactive: float, log: str = ""
) -> dict[str, Any]:
    """Return the settings of the broker's consumer of one partition, without where it begins.

    Each of ``partitions`` gets its share of the events in flight, at least one. ``inactive``: seconds without a reader
    after which the broker removes it; 0 is never. ``log``: the incarnation of the log that it reads.
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
    """Return where the broker's consumer of a partition begins that is there when the consumer is created."""
    if partition == AGAIN:
        return {"deliver_policy": "all"}
    if spec.after is not None:
        cursor = Cursor.parse(spec.after)
        if cursor.partition == partition:
            return {"deliver_policy": "by_start_sequence", "opt_start_seq": cursor.seq + 1}
        return {"deliver_policy": "all"}  # the session is not there now; what comes there later comes after the cursor
    if spec.since is not None:
        return {"deliver_policy": "by_start_time", "opt_start_time": rfc3339(spec.since)}
    return {"deliver_policy": "new" if spec.start == "new" else "all"}


def resumed_position(info: DurableInfo, base: int) -> dict[str, Any] | None:
    """Return where a consumer is to begin again whose log has lost its end; ``None`` when its position still holds.

    ``base``: up to there the log holds what it held before. The broker delivers nothing up to a position beyond it.
    """
    if info.delivered.stream_seq <= base:
        return None
    return {"deliver_policy": "by_start_sequence", "opt_start_seq": min(info.ack_floor.stream_seq, base) + 1}


def later_position(spec: ConsumerSpec, partition: int, log: str, created: str) -> dict[str, Any]:
    """Return where the consumer of a partition begins that appeared, or was lost, after the consumer was created.

    ``log``: the incarnation of the partition's log; ``created``: when the consumer was created, by the broker's clock.
    """
    if partition == AGAIN or spec.since is not None:
        return first_position(spec, partition)
    if spec.after is not None and Cursor.parse(spec.after).incarnation != incarnation(log):
        return {"deliver_policy": "all"}
    if spec.after is None and spec.start == "new":
        return {"deliver_policy": "by_start_time", "opt_start_time": created}
    return first_position(spec, partition)


def rfc3339(moment: float) -> str:
    """Return seconds since 1970 as the broker reads a time."""
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")


def seconds(created: str) -> float:
    """Return a time as the broker writes it in seconds since 1970."""
    return datetime.fromisoformat(created).timestamp()


def incarnation(log: str) -> str:
    """Return a short name of a log's incarnation, as it stands in cursors."""
    return CursorIssuer(0, log, "", "").incarnation
