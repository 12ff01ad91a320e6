"""Permissions of each service on NATS, as data: exactly the subjects it needs. Pure.

`users_config` renders them as the `authorization` block of a nats-server configuration. The services themselves do not
create or change streams: the user ``setup`` does (``tailrace topology apply``).
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from schemas.budgets import RELEASE_SUBJECT, RESERVE_SUBJECT, budgets_key
from schemas.delivered import DELIVERED_FILTER
from schemas.log_marks import MARKS_SUBJECT
from schemas.partitions import HISTORY_SUBJECT
from schemas.storage import REFUSED_SUBJECT, probes
from schemas.subjects import DELETED_FILTER, REQUESTS_PREFIX, lane_of
from schemas.topology import (
    BUCKET,
    CONSUMERS,
    CREDENTIALS_BUCKET,
    DEAD,
    DELIVERED,
    DELIVERED_DURABLE,
    REGISTRY_BUCKET,
    REQUESTS,
    Topology,
    billing_durable,
    bucket_stream,
    producers_durable,
    token_stream,
)

__all__ = ["USERS", "Permissions", "permissions", "users_config"]

USERS: Final = ("producer", "delivery", "billing", "setup")
_KEPT: Final = ("DIRECT.GET", "STREAM.MSG.GET", "STREAM.PURGE")
_PASSWORDS: Final = {user: f"NATS_{user.upper()}_PASSWORD" for user in USERS}


class Permissions(msgspec.Struct, frozen=True):
    """Subjects that a user may publish to and subscribe to.

    ``denied``: exceptions from ``publish``. ``replies``: whether it may answer a received request on the request's
    reply subject.
    """

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    denied: tuple[str, ...] = ()
    replies: bool = False


def permissions(topology: Topology) -> Mapping[str, Permissions]:
    """Return the permissions of each of `USERS`."""
    return {
        "producer": _producer(topology),
        "delivery": _delivery(topology),
        "billing": _billing(topology),
        "setup": Permissions(
            publish=(
                "$JS.API.INFO",
                "$JS.API.STREAM.>",
                "$JS.API.CONSUMER.>",
                "$JS.API.DIRECT.GET.>",
                HISTORY_SUBJECT,
                MARKS_SUBJECT,
            ),
            subscribe=(_inbox("setup"),),
        ),
    }


def _producer(topology: Topology) -> Permissions:
    lanes = _lanes(topology)
    return Permissions(
        publish=(
            "tokens.>",
            "presence.*.*.*",
            "holder.*.*.*",
            *(f"dead.{lane}.*" for lane in lanes),
            *_written(BUCKET, ">"),
            *_written(REGISTRY_BUCKET, "pool.*", "circuit.>"),
            MARKS_SUBJECT,
            *probes("producer"),
            *_topology_read(topology),
            *_logs_read(topology),
            *_bucket_read(BUCKET),
            *_bucket_read(REGISTRY_BUCKET),
            *_bucket_watched(REGISTRY_BUCKET),
            *(f"$JS.API.CONSUMER.MSG.NEXT.{REQUESTS}.{producers_durable(lane)}" for lane in lanes),
            *(f"$JS.ACK.{REQUESTS}.{producers_durable(lane)}.>" for lane in lanes),
            *_consumers_reset([(REQUESTS, producers_durable(lane)) for lane in lanes]),
        ),
        subscribe=(_inbox("producer"), "control.*.*.*", "holder.*.*.*", REFUSED_SUBJECT),
        replies=True,
    )


def _delivery(topology: Topology) -> Permissions:
    return Permissions(
        publish=(
            *(f"{REQUESTS_PREFIX}.{lane}.*" for lane in _lanes(topology)),
            *(
                f"$JS.API.STREAM.MSG.{verb}.{REQUESTS}" for verb in ("GET", "DELETE")
            ),  # a refused request is removed from the queue
            "control.*.*.*",
            RESERVE_SUBJECT,
            RELEASE_SUBJECT,
            *_written(BUCKET, ">"),
            MARKS_SUBJECT,
            *probes("delivery"),
            *_topology_read(topology),
            *_logs_read(topology),
            *_bucket_read(BUCKET),
            *_bucket_read(REGISTRY_BUCKET),
            *_bucket_read(CREDENTIALS_BUCKET),
            *_written(CREDENTIALS_BUCKET, "key.*", "ticket-secret"),
            "counters.*.*",
            DELIVERED_FILTER,
            DELETED_FILTER,
            *(f"$JS.API.STREAM.PURGE.{token_stream(p)}" for p in topology.logs),
            *(f"$JS.API.{verb}.{each}" for each in (DEAD, CONSUMERS) for verb in _KEPT),
            "consumers.*.*.*.*",
            *_consumers_kept([*(token_stream(p) for p in topology.logs), CONSUMERS]),
        ),
        denied=_foreign_consumers(topology),
        subscribe=(_inbox("delivery"), "live.>", "presence.>", DELETED_FILTER, REFUSED_SUBJECT),
        replies=True,
    )


def _billing(topology: Topology) -> Permissions:
    consumers = [*((token_stream(p), billing_durable(p)) for p in topology.logs), (DELIVERED, DELIVERED_DURABLE)]
    return Permissions(
        publish=(
            *_topology_read(topology),
            *_logs_read(topology),
            *_bucket_read(REGISTRY_BUCKET),
            *_bucket_read(CREDENTIALS_BUCKET),
            MARKS_SUBJECT,
            *probes("billing"),
            *(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}" for stream, durable in consumers),
            *(f"$JS.ACK.{stream}.{durable}.>" for stream, durable in consumers),
            *_consumers_reset(consumers),
            *_written(REGISTRY_BUCKET, budgets_key("*")),
            "control.*.*.*",
        ),
        subscribe=(_inbox("billing"), RESERVE_SUBJECT, RELEASE_SUBJECT, REFUSED_SUBJECT),
        replies=True,
    )


def _consumers_reset(consumers: Sequence[tuple[str, str]]) -> list[str]:
    """Return the subjects to re-create the service's own consumers when their position is beyond their stream."""
    return [f"$JS.API.CONSUMER.{verb}.{stream}.{own}" for stream, own in consumers for verb in ("CREATE", "DELETE")]


def _consumers_kept(streams: Sequence[str]) -> list[str]:
    """Return the subjects to create, inspect, pause, read and delete durable consumers of these streams."""
    return [
        subject
        for stream in streams
        for subject in (
            f"$JS.API.CONSUMER.LIST.{stream}",
            *(f"$JS.API.CONSUMER.{verb}.{stream}.*" for verb in ("CREATE", "INFO", "DELETE", "PAUSE", "MSG.NEXT")),
            f"$JS.ACK.{stream}.*.>",
        )
    ]


def _foreign_consumers(topology: Topology) -> tuple[str, ...]:
    """Return the subjects of billing's consumers, listed one by one: a permission cannot match a name prefix."""
    consumers = [f"{token_stream(p)}.{billing_durable(p)}" for p in topology.logs]
    verbs = ("CREATE", "DELETE", "PAUSE", "MSG.NEXT")
    return tuple(
        subject
        for consumer in consumers
        for subject in (*(f"$JS.API.CONSUMER.{verb}.{consumer}" for verb in verbs), f"$JS.ACK.{consumer}.>")
    )


def _lanes(topology: Topology) -> tuple[str, str]:
    return lane_of(topology.pool, "interactive"), lane_of(topology.pool, "batch")


def _inbox(user: str) -> str:
    return f"_INBOX.{user}.>"


def _topology_read(topology: Topology) -> list[str]:
    """Return the subjects to check that all streams exist, and to read their fill level."""
    return [
        "$JS.API.STREAM.NAMES",
        *(f"$JS.API.STREAM.INFO.{stream.name}" for stream in topology.streams()),
        *(f"$JS.API.CONSUMER.INFO.{c.stream}.{c.durable}" for c in topology.consumers()),
    ]


def _logs_read(topology: Topology) -> list[str]:
    streams = [token_stream(p) for p in topology.logs]
    return [f"$JS.API.{verb}.{stream}" for stream in streams for verb in ("DIRECT.GET", "STREAM.MSG.GET")]


def _bucket_read(bucket: str) -> list[str]:
    stream = bucket_stream(bucket)
    return [
        f"$JS.API.DIRECT.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}.>",
        f"$JS.API.STREAM.MSG.GET.{stream}",
    ]


def _bucket_watched(bucket: str) -> list[str]:
    """Return the subjects to watch a bucket through an ephemeral consumer that the client creates and deletes."""
    stream = bucket_stream(bucket)
    verbs = ("CREATE", "INFO", "DELETE")
    return [
        *(f"$JS.API.CONSUMER.{verb}.{stream}.>" for verb in verbs),
        f"$JS.API.CONSUMER.CREATE.{stream}",
        f"$JS.FC.{stream}.>",
    ]


def _written(bucket: str, *keys: str) -> list[str]:
    return [f"$KV.{bucket}.{key}" for key in keys]


def users_config(topology: Topology, passwords: Mapping[str, str] = _PASSWORDS) -> str:
    """Return the `authorization` block for nats-server; ``passwords`` names the variable with each user's password."""
    blocks = [_user(user, passwords[user], allowed) for user, allowed in permissions(topology).items()]
    return "authorization {\n  users = [\n" + "".join(blocks) + "  ]\n}\n"


def _user(user: str, password: str, allowed: Permissions) -> str:
    replies = "        allow_responses: true\n" if allowed.replies else ""
    denied = f"          deny: [\n{_lines(allowed.denied)}        ]\n" if allowed.denied else ""
    return (
        f"    {{\n      user: {user}\n      password: ${password}\n      permissions: {{\n"
        f"        publish: {{ allow: [\n{_lines(allowed.publish)}        ]\n{denied}        }}\n"
        f"        subscribe: {{ allow: [\n{_lines(allowed.subscribe)}        ] }}\n"
        f"{replies}      }}\n    }}\n"
    )


def _lines(subjects: Sequence[str]) -> str:
    return "".join(f'          "{subject}"\n' for subject in dict.fromkeys(subjects))
