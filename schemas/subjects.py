"""Build, validate and parse NATS subjects."""

import hashlib
import re
from typing import Final, NamedTuple

from schemas.names import check_name

__all__ = [
    "DELETED_FILTER",
    "Address",
    "InvalidSubject",
    "consumer_filter",
    "consumer_subject",
    "REQUESTS_PREFIX",
    "control_subject",
    "dead_filter",
    "dead_subject",
    "deleted_subject",
    "generation_key",
    "holder_subject",
    "lane_of",
    "live_filter",
    "log_filter",
    "parse_address",
    "partition_filter",
    "partition_of",
    "presence_filter",
    "presence_subject",
    "request_filter",
    "request_subject",
    "session_key",
    "token_subject",
]

DELETED_FILTER: Final = "deleted.*.*"
REQUESTS_PREFIX: Final = "requests"
_ADDRESS: Final = re.compile(
    r"(?:tokens|live)\.(0|[1-9][0-9]{0,2})\.([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_-]{1,64})"
)


class InvalidSubject(ValueError):
    """A subject that does not have the shape ``<root>.<partition>.<tenant>.<session>.<generation>``."""


class Address(NamedTuple):
    """The address of a generation. ``partition`` follows from tenant and session (see `schemas.partitions`)."""

    partition: int
    tenant: str
    session: str
    generation: str

    @classmethod
    def of(cls, tenant: str, session: str, generation: str, partitions: int) -> "Address":
        """Return the address of a generation under a constant number of partitions.

        Raises:
            InvalidName: a name is not a valid subject token.
        """
        return cls.at(partition_of(tenant, session, partitions), tenant, session, generation)

    @classmethod
    def at(cls, partition: int, tenant: str, session: str, generation: str) -> "Address":
        """Return the address of a generation in a known partition.

        Raises:
            InvalidName: a name is not a valid subject token.
        """
        check_name("tenant", tenant)
        check_name("session", session)
        check_name("generation", generation)
        return cls(partition, tenant, session, generation)


def partition_of(tenant: str, session: str, partitions: int) -> int:
    """Return the partition of a session: a stable hash (SHA-256) of tenant and session modulo ``partitions``."""
    if partitions == 1:
        return 0
    digest = hashlib.sha256(f"{tenant}.{session}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % partitions


def token_subject(address: Address) -> str:
    """Return the subject under which the log keeps a generation's events."""
    return f"tokens.{address.partition}.{address.tenant}.{address.session}.{address.generation}"


def partition_filter(partition: int) -> str:
    """Return the filter of all events in a partition's log."""
    return f"tokens.{partition}.*.*.*"


def log_filter(partition: int, tenant: str, session: str, generation: str = "*") -> str:
    """Return the filter for the stored events of a session, or of one of its generations.

    Raises:
        InvalidName: tenant or session is not a valid name, or the generation is neither a name nor ``*``.
    """
    return f"tokens.{partition}.{_within_session(tenant, session, generation)}"


def live_filter(partition: int, tenant: str, session: str, generation: str = "*") -> str:
    """Return the core subject on which stored events of a session are republished.

    Raises:
        InvalidName: tenant or session is not a valid name, or the generation is neither a name nor ``*``.
    """
    return f"live.{partition}.{_within_session(tenant, session, generation)}"


def _within_session(tenant: str, session: str, generation: str) -> str:
    # A wildcard in untrusted input must never widen a filter beyond one session.
    if generation != "*":
        check_name("generation", generation)
    return f"{check_name('tenant', tenant)}.{check_name('session', session)}.{generation}"


def parse_address(subject: str) -> Address:
    """Parse the address in a ``tokens.…`` or ``live.…`` subject.

    Raises:
        InvalidSubject: ``subject`` is not such a subject.
    """
    match = _ADDRESS.fullmatch(subject)
    if match is None:
        raise InvalidSubject(f"subject {subject!r} is not tokens|live.<partition>.<tenant>.<session>.<generation>")
    partition, tenant, session, generation = match.groups()
    return Address(int(partition), tenant, session, generation)


def lane_of(pool: str, priority: str) -> str:
    """Return the lane of a pool's requests of a priority: the pool's own, or its batch lane."""
    return pool if priority == "interactive" else f"{pool}-{priority}"


def request_subject(pool: str, generation: str) -> str:
    """Return the work-queue subject of one request; it keeps at most one message per generation."""
    return f"{REQUESTS_PREFIX}.{check_name('pool', pool)}.{check_name('generation', generation)}"


def dead_subject(pool: str, generation: str) -> str:
    """Return the subject of a dead request."""
    return f"dead.{check_name('pool', pool)}.{check_name('generation', generation)}"


def dead_filter(pool: str) -> str:
    """Return the filter of a pool's dead requests."""
    return f"dead.{check_name('pool', pool)}.*"


def consumer_subject(kind: str, tenant: str, name: str, event: str) -> str:
    """Return the subject of an event kept for a service's consumer: ``dead``, or to be delivered ``again``."""
    return f"consumers.{kind}.{_of_consumer(tenant, name)}.{check_name('event', event)}"


def consumer_filter(kind: str, tenant: str, name: str) -> str:
    """Return the filter of all events of a kind kept for a service's consumer."""
    return f"consumers.{kind}.{_of_consumer(tenant, name)}.*"


def _of_consumer(tenant: str, name: str) -> str:
    return f"{check_name('tenant', tenant)}.{check_name('consumer', name)}"


def request_filter(pool: str) -> str:
    """Return the filter of a pool's requests."""
    return f"{REQUESTS_PREFIX}.{check_name('pool', pool)}.*"


def control_subject(tenant: str, session: str, generation: str) -> str:
    """Return the core subject on which the running producer of a generation receives control messages.

    Raises:
        InvalidName: a name is not a valid subject token.
    """
    return f"control.{_one_generation(tenant, session, generation)}"


def holder_subject(tenant: str, session: str, generation: str) -> str:
    """Return the core subject on which a producer is asked whether it runs a generation.

    Raises:
        InvalidName: a name is not a valid subject token.
    """
    return f"holder.{_one_generation(tenant, session, generation)}"


def presence_subject(tenant: str, session: str, generation: str) -> str:
    """Return the core subject whose interest shows that a generation has a subscriber.

    Raises:
        InvalidName: a name is not a valid subject token.
    """
    return f"presence.{_one_generation(tenant, session, generation)}"


def presence_filter(tenant: str, session: str, generation: str = "*") -> str:
    """Return the presence subject of a generation, or of all generations of a session.

    Raises:
        InvalidName: a name is not a valid subject token.
    """
    if generation != "*":
        return presence_subject(tenant, session, generation)
    return f"presence.{check_name('tenant', tenant)}.{check_name('session', session)}.*"


def generation_key(tenant: str, session: str, generation: str) -> str:
    """Return the key of a generation in the look-up bucket.

    Raises:
        InvalidName: a name is not a valid subject token.
    """
    return _one_generation(tenant, session, generation)


def session_key(tenant: str, session: str) -> str:
    """Return the key of a deleted session in the look-up bucket.

    Raises:
        InvalidName: a name is not a valid subject token.
    """
    return f"{check_name('tenant', tenant)}.{check_name('session', session)}"


def deleted_subject(tenant: str, session: str) -> str:
    """Return the core subject that notifies delivery's replicas of a deleted session.

    Raises:
        InvalidName: a name is not a valid subject token.
    """
    return f"deleted.{session_key(tenant, session)}"


def _one_generation(tenant: str, session: str, generation: str) -> str:
    return f"{check_name('tenant', tenant)}.{check_name('session', session)}.{check_name('generation', generation)}"
