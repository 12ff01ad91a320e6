"""Delete sessions: their events in the log, their records, and their dead requests and events. Bills stay.

The steps can be interrupted anywhere; a repeated call continues. Nothing of a generation is removed while
its request is in the work queue, and only generations are removed that were there when the deletion began, so that a
start on the same session beside it is safe.
"""

import asyncio
from collections.abc import Awaitable, Callable, Container, Iterable
from typing import Final

import msgspec
import structlog

from schemas.requests import DeletedSession, GenerationRecord
from schemas.subjects import (
    dead_filter,
    dead_subject,
    deleted_subject,
    lane_of,
    log_filter,
    parse_address,
    request_filter,
)
from schemas.topology import DEAD, REQUESTS, billing_durable, token_stream
from services.delivery.errors import Unknown
from services.delivery.log.states import LogStates
from services.delivery.requests.deleted_sessions import DeletedSessions
from services.delivery.requests.generations import ENDED, Lookups
from services.delivery.requests.intake import Intake
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker
from services.kit.jetstream.consumer import Durables
from services.kit.problem import Problem
from services.kit.stamps import nanoseconds

__all__ = ["Deletion"]

log = structlog.get_logger()
POLL_SECONDS: Final = 0.1
CANCEL_SECONDS: Final = 10.0
"""Seconds to wait for cancelled generations to end."""
RECORD_SECONDS: Final = 2.0
"""Seconds to wait for the record of a generation that has left the queue: it is written apart from the log."""
START_SECONDS: Final = 15.0
"""Age below which a record whose request is not in the queue may belong to a start that is about to queue it."""
BILLED_SECONDS: Final = 10.0
UNBILLED_SECONDS: Final = 600.0
"""Age of billing's consumer beyond which, if it has never read anything, no billing runs here."""
NAMED: Final = 10
PurgeDead = Callable[[str, str, Container[str]], Awaitable[None]]
"""Removes the dead events of some generations of a tenant's session permanently."""


class Deletion:
    """Delete sessions. ``pool``: the pool whose requests may run in them.

    ``purge_dead``: removes the dead events that durable consumers keep of a session.
    """

    def __init__(
        self,
        broker: Broker,
        clock: Clock,
        states: LogStates,
        lookups: Lookups,
        intake: Intake,
        deleted: DeletedSessions,
        purge_dead: PurgeDead,
        pool: str,
    ) -> None:
        self._broker = broker
        self._clock = clock
        self._states = states
        self._lookups = lookups
        self._deleted = deleted
        self._purge_dead = purge_dead
        self._intake = intake
        self._lanes = (lane_of(pool, "interactive"), lane_of(pool, "batch"))

    async def delete(self, tenant: str, session: str, *, cancel: bool) -> None:
        """Delete a session. ``cancel``: first cancel its queued and running generations.

        Raises:
            Unknown: the session does not exist and was not deleted recently.
            Problem: 409, generations are queued or running; 503, billing has not read the session yet.
            BrokerUnavailable: the broker does not answer; the deletion may be incomplete and must be repeated.
        """
        # Before the generations are listed: events stored later belong to a listed generation or to a later one.
        partition = await self._states.partition(tenant, session)
        state = await self._states.state(partition, fresh=True)
        stored = await self._stored(tenant, session)
        records = {record.generation: record for record, _ in await self._lookups.kept(tenant, session)}
        generations = {*stored, *records}
        if not generations and await self._lookups.deletion(tenant, session) is None:
            raise Unknown(f"there is no session {session!r}")
        # Wait until nothing writes to the session and billing has read it.
        await self._settle(tenant, session, generations, cancel=cancel)
        await self._wait_for_billing(tenant, session, {parse_address(s).partition for s in _flat(stored.values())})
        # Record the deletion first, so that an interrupted one can be repeated; then remove records and events.
        deleted = DeletedSession(
            tenant=tenant,
            session=session,
            partition=partition,
            incarnation=state.created,
            through=state.last_seq,
            deleted_at=self._clock.wall(),
        )
        await self._lookups.note_deletion(deleted)
        for generation in sorted(generations):
            await self._bury(tenant, session, generation)
        for subject in _flat(stored.values()):
            await self._broker.purge(token_stream(parse_address(subject).partition), subject)
        await self._forget_dead(tenant, session, generations)
        # Notify the other replicas, then this one.
        await self._broker.publish(deleted_subject(tenant, session), msgspec.json.encode(deleted))
        await self._deleted.notify(deleted)
        log.info("session deleted", session=session, generations=len(generations))

    async def _stored(self, tenant: str, session: str) -> dict[str, list[str]]:
        """Return the log subjects of each generation, over all partitions."""
        found: dict[str, list[str]] = {}
        for partition in await self._broker.partitions():
            subjects = await self._broker.subjects(token_stream(partition), log_filter(partition, tenant, session))
            for subject in subjects:
                found.setdefault(parse_address(subject).generation, []).append(subject)
        return found

    async def _settle(self, tenant: str, session: str, generations: set[str], *, cancel: bool) -> None:
        """Wait until no generation can be written to any more."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        cancelled: set[str] = set()
        while True:
            busy, closing = await self._open(tenant, session, generations)
            waited = loop.time() - begun
            if cancel:
                for generation in busy - cancelled:
                    await self._intake.cancel(tenant, session, generation)
                    cancelled.add(generation)
            if busy and (not cancel or waited > CANCEL_SECONDS):
                raise _busy(session, busy, cancelled=cancel)
            if not busy and (not closing or waited > RECORD_SECONDS):
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _open(self, tenant: str, session: str, generations: set[str]) -> tuple[set[str], set[str]]:
        """Return the generations that are queued, running or being started, and those whose records are not closed."""
        queued: set[str] = set()
        for lane in self._lanes:
            subjects = await self._broker.subjects(REQUESTS, request_filter(lane))
            queued |= {subject.rpartition(".")[2] for subject in subjects}
        busy, closing = generations & queued, set[str]()
        for record, _ in await self._lookups.kept(tenant, session):
            if record.generation not in generations or record.generation in busy or record.state in ENDED:
                continue
            fresh = self._clock.wall() - record.created_at < START_SECONDS
            ended = not fresh or await self._has_ended(record)
            (closing if ended else busy).add(record.generation)
        return busy, closing

    async def _has_ended(self, record: GenerationRecord) -> bool:
        transcript = await self._lookups.transcript(record.tenant, record.session, record.generation)
        return transcript.terminal is not None

    async def _wait_for_billing(self, tenant: str, session: str, partitions: Iterable[int]) -> None:
        """Wait until billing has read all stored events: a bill must not be lost with them.

        Raises:
            Problem: 503, billing has not read them within `BILLED_SECONDS`.
        """
        give_up_at = asyncio.get_running_loop().time() + BILLED_SECONDS
        for partition in partitions:
            last = await self._broker.last(token_stream(partition), log_filter(partition, tenant, session))
            while last is not None and not await self._has_billed(partition, last.seq):
                if asyncio.get_running_loop().time() > give_up_at:
                    raise Problem(
                        503,
                        f"billing has not read session {session!r} yet: its events are kept until it has",
                        slug="billing-behind",
                        title="Billing is behind",
                        headers={"Retry-After": "10"},
                    )
                await asyncio.sleep(POLL_SECONDS)

    async def _has_billed(self, partition: int, seq: int) -> bool:
        info = await Durables(self._broker).info(token_stream(partition), billing_durable(partition))
        if info is None or info.ack_floor.stream_seq >= seq or (not info.num_pending and not info.num_ack_pending):
            return True
        age = self._clock.wall() - nanoseconds(info.created) / 1e9
        return info.delivered.stream_seq == 0 and age > UNBILLED_SECONDS

    async def _bury(self, tenant: str, session: str, generation: str) -> None:
        """Replace a generation's record with a tombstone, so that its name is not reused."""
        while True:
            found = await self._lookups.get(tenant, session, generation)
            if found is not None and found[0].state == "deleted":
                return
            tombstone = GenerationRecord(
                tenant=tenant,
                session=session,
                generation=generation,
                state="deleted",
                model="",
                created_at=found[0].created_at if found else self._clock.wall(),
                request_hash=found[0].request_hash if found else "",
            )
            if found is None:
                if await self._lookups.create(tombstone) is not None:
                    return
            elif await self._lookups.update(tombstone, found[1]):
                return

    async def _forget_dead(self, tenant: str, session: str, generations: set[str]) -> None:
        """Remove dead requests, and dead events of durable consumers."""
        for lane in self._lanes:
            for subject in await self._broker.subjects(DEAD, dead_filter(lane)):
                generation = subject.rpartition(".")[2]
                if generation in generations:
                    await self._broker.purge(DEAD, dead_subject(lane, generation))
        await self._purge_dead(tenant, session, generations)


def _flat(subjects: Iterable[list[str]]) -> list[str]:
    return [subject for each in subjects for subject in each]


def _busy(session: str, busy: set[str], *, cancelled: bool) -> Problem:
    names = ", ".join(sorted(busy)[:NAMED]) + (f" and {len(busy) - NAMED} more" if len(busy) > NAMED else "")
    hint = "they are being cancelled: ask again" if cancelled else "wait for their end, or delete with cancel=true"
    return Problem(
        409,
        f"session {session!r} has generations that have not ended ({names}): {hint}",
        slug="session-busy",
        title="The session is in use",
    )
