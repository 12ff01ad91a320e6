"""Keep dead events, which no delivery had acknowledged: list, redeliver and remove them."""

from collections import Counter
from collections.abc import Container
from typing import Final

import msgspec

from schemas.subjects import consumer_filter, consumer_subject
from schemas.topology import CONSUMERS
from services.delivery import metrics
from services.delivery.errors import TooBusy, Unknown
from services.kit.jetstream.broker import Broker, Stored
from services.kit.jetstream.errors import APIError

__all__ = ["DeadEvent", "DeadEvents"]

ROOM: Final = 4_096
"""Upper bound in bytes of the fields that a dead event adds to the event."""


class DeadEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event that was not acknowledged. ``id``: its cursor. ``died_at``: in seconds since 1970.

    ``event``: as stored in the log; null when it is too large to be kept here.
    """

    id: str
    session: str
    generation: str
    seq: int
    type: str
    deliveries: int
    died_at: float
    event: msgspec.Raw


class DeadEvents:
    """Store the dead events of all consumers. ``limit``: most dead events of one consumer.

    Every method raises `BrokerUnavailable` when the broker does not answer.
    """

    def __init__(self, broker: Broker, limit: int) -> None:
        self._broker = broker
        self.limit = limit

    async def count(self, tenant: str, name: str) -> int:
        """Return the number of dead events of a consumer."""
        return len(await self._broker.subjects(CONSUMERS, consumer_filter("dead", tenant, name)))

    async def counts(self, tenant: str) -> Counter[str]:
        """Return the number of dead events by consumer name, for the consumers of a tenant that have any."""
        subjects = await self._broker.subjects(CONSUMERS, f"consumers.dead.{tenant}.*.*")
        return Counter(subject.split(".")[3] for subject in subjects)

    async def put(self, tenant: str, name: str, dead: DeadEvent) -> None:
        """Store a dead event; one that is stored already stays unchanged.

        Raises:
            TooBusy: the consumer has ``limit`` dead events, or the broker refuses to store it.
        """
        if await self.count(tenant, name) >= self.limit:
            raise TooBusy(f"consumer {name!r} has {self.limit} dead events, the largest number: remove or resend some")
        if len(dead.event) > self._broker.client.max_payload - ROOM:
            dead = msgspec.structs.replace(dead, event=msgspec.Raw(b"null"))
        await self._store("dead", tenant, name, dead)
        metrics.CONSUMER_DEAD.inc()

    async def page(self, tenant: str, name: str, limit: int, after: int) -> tuple[list[DeadEvent], int | None]:
        """Return up to ``limit`` dead events after the stream sequence ``after``, oldest first.

        The second value is the ``after`` of the next page; ``None`` on the last page.
        """
        found: list[DeadEvent] = []
        last = 0
        async for batch in self._broker.read(CONSUMERS, consumer_filter("dead", tenant, name), after + 1):
            for stored in batch:
                if len(found) == limit:
                    return found, last
                found.append(_decoded(stored))
                last = stored.seq
        return found, None

    async def get(self, tenant: str, name: str, event: str) -> DeadEvent:
        """Return a dead event.

        Raises:
            Unknown: it does not exist.
        """
        stored = await self._broker.last(CONSUMERS, consumer_subject("dead", tenant, name, event))
        if stored is None:
            raise Unknown(f"consumer {name!r} has no dead event {event[:60]!r}")
        return _decoded(stored)

    async def again(self, tenant: str, name: str, event: str) -> None:
        """Queue a dead event for redelivery to its consumer, then remove it from the dead events.

        Raises:
            Unknown: it does not exist, or was too large to be kept.
            TooBusy: the broker refuses to store it.
        """
        dead = await self.get(tenant, name, event)
        if bytes(dead.event) == b"null":
            raise Unknown(f"event {event} was too large to be kept: read its session before this cursor")
        await self._store("again", tenant, name, dead)
        await self.drop(tenant, name, event)

    async def drop(self, tenant: str, name: str, event: str) -> None:
        """Remove a dead event permanently; do nothing when it does not exist."""
        await self._purge(consumer_subject("dead", tenant, name, event))

    async def clear(self, tenant: str, name: str) -> None:
        """Remove all dead events of a consumer, including those queued for redelivery."""
        for kind in ("dead", "again"):
            await self._purge(consumer_filter(kind, tenant, name))

    async def forget_session(self, tenant: str, session: str, generations: Container[str]) -> None:
        """Remove the dead events of these generations of a session, for all consumers of its tenant."""
        async for batch in self._broker.read(CONSUMERS, f"consumers.*.{tenant}.*.*"):
            for stored in batch:
                dead = _decoded(stored)
                if dead.session == session and dead.generation in generations:
                    await self._purge(stored.subject)

    async def _store(self, kind: str, tenant: str, name: str, dead: DeadEvent) -> None:
        subject = consumer_subject(kind, tenant, name, dead.id)
        try:
            await self._broker.publish_stored(subject, msgspec.json.encode(dead))
        except APIError as error:
            if await self._broker.last(CONSUMERS, subject) is None:
                raise TooBusy(f"the broker stores no more dead events: {error.description}") from error

    async def _purge(self, subject: str) -> None:
        await self._broker.purge(CONSUMERS, subject)


def _decoded(stored: Stored) -> DeadEvent:
    return msgspec.json.decode(stored.data, type=DeadEvent)
