"""Streams, consumers and buckets as data; the first process to start applies them idempotently."""

from typing import Final

import msgspec

from schemas.delivered import DELIVERED_FILTER
from schemas.subjects import REQUESTS_PREFIX, lane_of, partition_filter

__all__ = [
    "BUCKET",
    "CONSUMERS",
    "COUNTERS",
    "CREDENTIALS_BUCKET",
    "DEAD",
    "DELIVERED",
    "DELIVERED_DURABLE",
    "REGISTRY_BUCKET",
    "REQUESTS",
    "ConsumerSpec",
    "StreamSpec",
    "Topology",
    "billing_durable",
    "bucket_stream",
    "producers_durable",
    "service_durable",
    "service_of",
    "token_partition",
    "token_stream",
]

BUCKET: Final = "generations"
CONSUMERS: Final = "CONSUMERS"
REGISTRY_BUCKET: Final = "registry"
CREDENTIALS_BUCKET: Final = "credentials"
COUNTERS: Final = "COUNTERS"
COUNTED_SECONDS: Final = 600.0  # counters expire after this time without a change
DELIVERED: Final = "DELIVERED"
DELIVERED_DURABLE: Final = "billing-delivered"
"""Billing's durable consumer of the delivery reports."""
DEAD: Final = "REQUESTS_DEAD"
REQUESTS: Final = "REQUESTS"


def token_stream(partition: int) -> str:
    """Return the name of the stream that keeps a partition's events."""
    return f"TOKENS_{partition}"


def token_partition(stream: str) -> int | None:
    """Return the partition whose events a stream keeps, or ``None`` for another kind of stream."""
    prefix, _, number = stream.partition("_")
    return int(number) if prefix == "TOKENS" and number.isdecimal() else None


def bucket_stream(bucket: str) -> str:
    """Return the name of the stream behind a bucket."""
    return f"KV_{bucket}"


def producers_durable(pool: str) -> str:
    """Return the name of the durable consumer shared by a pool of producers."""
    return f"producers-{pool}"


def billing_durable(partition: int) -> str:
    """Return the name of billing's durable consumer of a partition."""
    return f"billing-{partition}"


def service_durable(tenant: str, name: str) -> str:
    """Return the name of a service's durable consumer, unique for each pair of tenant and name."""
    return f"svc-{len(tenant)}-{tenant}-{name}"


def service_of(durable: str) -> tuple[str, str] | None:
    """Return tenant and name of a service's durable consumer, or ``None`` for another kind of consumer."""
    kind, _, rest = durable.partition("-")
    length, _, names = rest.partition("-")
    if kind != "svc" or not length.isdecimal():
        return None
    tenant, name = names[: int(length)], names[int(length) + 1 :]
    return (tenant, name) if name and durable == service_durable(tenant, name) else None


class StreamSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A JetStream stream. Ages in seconds, sizes in bytes; ``-1`` means no bound.

    ``refuses``: a full stream refuses new messages instead of dropping its oldest ones. ``bucket``: keep only the
    newest message of each subject, as a key-value bucket. ``counter``: each subject is a number that messages change,
    kept only in memory.
    """

    name: str
    subjects: tuple[str, ...]
    work_queue: bool = False
    refuses: bool = False
    bucket: bool = False
    counter: bool = False
    max_age: float = 0.0
    max_bytes: int = -1
    max_msgs: int = -1
    max_msg_size: int = -1
    replicas: int = 1
    republish: tuple[str, str] | None = None
    one_per_subject: bool = False
    duplicate_window: float = 120.0


class ConsumerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A durable pull consumer with unbounded redelivery. ``ack_wait`` in seconds.

    ``ack_all``: acknowledging one message acknowledges all before it, for a reader that takes the log in order.
    """

    stream: str
    durable: str
    filter: str
    ack_wait: float
    max_ack_pending: int
    ack_all: bool = False


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """The streams, consumers and buckets that the services need on the broker.

    ``kept``: partitions above the present count whose streams still exist from a higher count.
    ``managed``: create missing objects and update different ones; otherwise only wait until all exist.
    """

    partitions: int = 1
    kept: tuple[int, ...] = ()
    managed: bool = True
    replicas: int = 1
    max_age: float = 86_400.0
    max_bytes: int = -1
    pool: str = "default"
    max_requests: int = 10_000
    ack_wait: float = 15.0

    @property
    def logs(self) -> tuple[int, ...]:
        """Return all partitions: those of the present count, and those kept."""
        return (*range(self.partitions), *(p for p in self.kept if p >= self.partitions))

    def streams(self) -> list[StreamSpec]:
        """Return the streams: a log per partition, work queue, dead requests, delivery reports, counters, and buckets.

        A log bounded in bytes refuses events when it is full, so it never drops those of a running answer.
        """
        logs = [
            StreamSpec(
                name=token_stream(p),
                subjects=(partition_filter(p),),
                max_age=self.max_age,
                max_bytes=self.max_bytes,
                refuses=self.max_bytes > 0,
                replicas=self.replicas,
                republish=(
                    partition_filter(p),
                    f"live.{p}.{{{{wildcard(1)}}}}.{{{{wildcard(2)}}}}.{{{{wildcard(3)}}}}",
                ),
            )
            for p in self.logs
        ]
        requests = StreamSpec(
            name=REQUESTS,
            subjects=(f"{REQUESTS_PREFIX}.*.*",),
            work_queue=True,
            refuses=True,
            max_age=self.max_age,
            max_msgs=self.max_requests,
            replicas=self.replicas,
            one_per_subject=True,
        )
        dead = StreamSpec(
            name=DEAD, subjects=("dead.*.*",), max_age=7 * 86_400.0, max_msgs=self.max_requests, replicas=self.replicas
        )
        delivered = StreamSpec(
            name=DELIVERED,
            subjects=(DELIVERED_FILTER,),
            max_age=self.max_age,
            max_msgs=1_000_000,
            replicas=self.replicas,
        )
        endless = [self._bucket(name, 0.0) for name in (REGISTRY_BUCKET, CREDENTIALS_BUCKET)]
        return [
            *logs,
            requests,
            dead,
            delivered,
            self._consumed(),
            self._counters(),
            self._bucket(BUCKET, self.max_age),
            *endless,
        ]

    def _consumed(self) -> StreamSpec:
        """Return the stream of the services' dead events, and of events to be delivered again.

        It is a work queue: a redelivered event is removed when acknowledged; dead events have no consumer and stay.
        """
        return StreamSpec(
            name=CONSUMERS,
            subjects=("consumers.*.*.*.*",),
            work_queue=True,
            refuses=True,
            one_per_subject=True,
            max_age=7 * 86_400.0,
            max_msgs=100_000,
            replicas=self.replicas,
        )

    def _counters(self) -> StreamSpec:
        return StreamSpec(
            name=COUNTERS,
            subjects=("counters.*.*",),
            counter=True,
            max_age=COUNTED_SECONDS,
            max_msgs=200_000,
            replicas=self.replicas,
        )

    def _bucket(self, name: str, max_age: float) -> StreamSpec:
        return StreamSpec(
            name=bucket_stream(name),
            subjects=(f"$KV.{name}.>",),
            bucket=True,
            refuses=True,
            max_age=max_age,
            replicas=self.replicas,
        )

    def consumers(self) -> list[ConsumerSpec]:
        """Return the durable consumers: of the work queue, and billing's of each partition and of delivery reports."""
        return [*self.producers(), *(self.billing(p) for p in self.logs), self.delivered()]

    def producers(self) -> list[ConsumerSpec]:
        """Return the durable consumers of the work queue: one for each lane of the pool."""
        return [
            ConsumerSpec(
                stream=REQUESTS,
                durable=producers_durable(lane),
                filter=f"{REQUESTS_PREFIX}.{lane}.*",
                ack_wait=self.ack_wait,
                max_ack_pending=10_000,
            )
            for lane in (lane_of(self.pool, "interactive"), lane_of(self.pool, "batch"))
        ]

    def delivered(self) -> ConsumerSpec:
        """Return billing's durable consumer of the delivery reports."""
        return ConsumerSpec(
            stream=DELIVERED,
            durable=DELIVERED_DURABLE,
            filter=DELIVERED_FILTER,
            ack_wait=30.0,
            max_ack_pending=10_000,
        )

    def billing(self, partition: int) -> ConsumerSpec:
        """Return billing's durable consumer of a partition."""
        return ConsumerSpec(
            stream=token_stream(partition),
            durable=billing_durable(partition),
            filter=partition_filter(partition),
            ack_wait=30.0,
            max_ack_pending=20_000,
            ack_all=True,
        )
