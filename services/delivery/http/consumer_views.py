"""Represent durable consumers and dead events in the HTTP API."""

from typing import Annotated, Any

import msgspec

from services.delivery.consumers.dead import DeadEvent
from services.delivery.consumers.definition import AGAIN
from services.delivery.consumers.registry import Found

__all__ = [
    "ConsumerList",
    "ConsumerView",
    "DeadEventList",
    "DeadEventView",
    "PartitionView",
    "Pause",
    "consumer_view",
    "dead_view",
]


class PartitionView(msgspec.Struct):
    """Position of a consumer in one partition. ``acked``: stream sequence up to which every event is settled."""

    partition: int
    delivered: int
    acked: int
    pending: int
    in_flight: int


class ConsumerView(msgspec.Struct, kw_only=True):
    """A durable consumer.

    ``pending``: stored messages that were never delivered, including those that its filter of types or the acceptance
    rule will drop. ``in_flight``: delivered and not settled; ``redelivered``: of those, delivered more than once.
    ``again``: dead events waiting for redelivery. ``dead``: dead events kept. ``paused_until``: null while a pause has
    no end time.
    """

    name: str
    session: str | None
    types: tuple[str, ...] | None
    start: str
    after: str | None
    since: float | None
    ack_wait: float
    max_in_flight: int
    max_deliver: int
    created_at: str
    pending: int
    in_flight: int
    redelivered: int
    again: int
    dead: int
    paused: bool
    paused_until: str | None
    position: list[PartitionView]


class ConsumerList(msgspec.Struct):
    """Durable consumers, by name."""

    consumers: list[ConsumerView]


class Pause(msgspec.Struct, forbid_unknown_fields=True):
    """``seconds``: length of the pause; without it the pause lasts until the consumer is resumed."""

    seconds: Annotated[float, msgspec.Meta(gt=0, le=3_153_600_000)] | None = None


class DeadEventView(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An event that no delivery had acknowledged. ``id`` is also its cursor. ``event``: as stored in the log."""

    id: str
    session: str
    generation: str
    seq: int
    type: str
    deliveries: int
    died_at: float
    event: Any


class DeadEventList(msgspec.Struct):
    """Dead events, oldest first. ``next``: pass it as ``after`` for the next page."""

    events: list[DeadEventView]
    next: str | None = None


def consumer_view(name: str, found: Found, dead: int) -> ConsumerView:
    """Return the view of a consumer; ``dead``: its number of dead events."""
    spec, infos = found.definition.spec, found.infos
    logs = {partition: info for partition, info in sorted(infos.items()) if partition != AGAIN}
    again = infos.get(AGAIN)
    paused = [info for info in infos.values() if info.paused]
    return ConsumerView(
        name=name,
        session=spec.session,
        types=spec.types,
        start=spec.start,
        after=spec.after,
        since=spec.since,
        ack_wait=spec.ack_wait,
        max_in_flight=spec.max_in_flight,
        max_deliver=spec.max_deliver,
        created_at=min(info.created for info in infos.values()),
        pending=sum(info.num_pending for info in logs.values()),
        in_flight=sum(info.num_ack_pending for info in infos.values()),
        redelivered=sum(info.num_redelivered for info in infos.values()),
        again=again.num_pending + again.num_ack_pending if again else 0,
        dead=dead,
        paused=bool(paused),
        paused_until=next((info.pause_until for info in paused), None),
        position=[
            PartitionView(p, i.delivered.stream_seq, i.ack_floor.stream_seq, i.num_pending, i.num_ack_pending)
            for p, i in logs.items()
        ],
    )


def dead_view(dead: DeadEvent) -> DeadEventView:
    """Return the view of a dead event."""
    fields = {name: getattr(dead, name) for name in DeadEvent.__struct_fields__}
    return DeadEventView(**(fields | {"event": msgspec.json.decode(dead.event)}))
