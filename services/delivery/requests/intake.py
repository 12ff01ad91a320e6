"""Accept requests for generations, and cancel generations."""

import hashlib
import secrets
from base64 import b32encode
from typing import Annotated, Any, Final

import msgspec

from schemas.control import CANCEL, OVER
from schemas.cursor import CursorIssuer
from schemas.events import type_of
from schemas.names import check_readable
from schemas.requests import (
    GenerationRecord,
    Message,
    OnDisconnect,
    OnProducerLoss,
    Priority,
    Request,
    RequestDeadlines,
)
from schemas.subjects import control_subject, lane_of, request_subject
from schemas.topology import REQUESTS as REQUESTS_STREAM
from services.delivery import metrics
from services.delivery.log.states import LogStates
from services.delivery.requests.budgets import BudgetReservations
from services.delivery.requests.deleted_sessions import DeletedSessions
from services.delivery.requests.generations import ENDED, Lookups
from services.delivery.requests.recent_starts import RecentStarts
from services.delivery.requests.start_limits import StartLimits
from services.delivery.requests.withdrawals import Start, Withdrawals
from services.kit.auth.principal import Principal
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.errors import APIError
from services.kit.jetstream.storage import Storage
from services.kit.problem import Problem
from services.kit.tasks import together

__all__ = ["GenerationRequest", "Intake"]

_MAX_METADATA: Final = 16
CANCEL_TRIES: Final = 5
REPEAT_TRIES: Final = 5
LOG_FULL: Final = 0.95
LOG_FULL_RETRY_SECONDS: Final = 30
STORAGE_RETRY_SECONDS: Final = 10
Label = Annotated[str, msgspec.Meta(max_length=64)]
Text = Annotated[str, msgspec.Meta(max_length=4_000)]


class GenerationRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of a request for a generation.

    ``model``: an alias, or ``provider/model``. ``messages`` and ``params`` in the OpenAI chat form. ``metadata``: up to
    16 labels that come back in ``started``; neither models nor labels have control characters in their names.
    ``on_disconnect``: ``"continue"`` or ``{"cancel_after": seconds}``.
    """

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=10_000)]
    params: dict[str, Any] = {}
    metadata: Annotated[dict[Label, Text], msgspec.Meta(max_length=_MAX_METADATA)] = {}
    on_disconnect: OnDisconnect = "continue"
    on_producer_loss: OnProducerLoss = "interrupt"
    priority: Priority = "interactive"
    deadlines: RequestDeadlines = RequestDeadlines()

    def __post_init__(self) -> None:
        check_readable("model", self.model)
        for label in self.metadata:
            check_readable("label", label)


class Intake:
    """Put requests into the work queue, once for each idempotency key, and cancel them."""

    def __init__(
        self,
        broker: Broker,
        clock: Clock,
        states: LogStates,
        storage: Storage,
        lookups: Lookups,
        deleted: DeletedSessions,
        starts: StartLimits,
        recent: RecentStarts,
        admission: BudgetReservations,
        pool: str,
    ) -> None:
        self._broker = broker
        self._states = states
        self._storage = storage
        self._deleted = deleted
        self._starts = starts
        self._recent = recent
        self._admission = admission
        self._lookups = lookups
        self._clock = clock
        self._pool = pool
        self._withdrawals = Withdrawals(broker, lookups, admission)

    async def accept(
        self, principal: Principal, session: str, request: GenerationRequest, key: str | None
    ) -> tuple[str, str, bool]:
        """Queue a request; return the generation's name, the cursor before it, and whether it is a repeat.

        Raises:
            Problem: too many are started or running, unknown model, no room in a budget, another request under the same
                key, queue or log full, or too large.
            BrokerUnavailable: nothing was queued.
        """
        async with self._starts.starting(principal):
            return await self._accept(principal, session, request, key)

    async def _accept(
        self, principal: Principal, session: str, request: GenerationRequest, key: str | None
    ) -> tuple[str, str, bool]:
        asked_at = self._clock.monotonic()
        if not self._storage.stores():
            metrics.LOG_FULL.inc()
            raise _not_stored()
        tenant = principal.tenant
        models = await self._candidates(request.model)
        generation = _name(tenant, session, key)
        issuer = await self._states.issuer(tenant, session)
        body = msgspec.json.encode(request)
        record = GenerationRecord(
            tenant=tenant,
            session=session,
            generation=generation,
            state="queued",
            model=request.model,
            created_at=self._clock.wall(),
            metadata=request.metadata,
            request_hash=hashlib.sha256(body).hexdigest()[:32],
            key=principal.key,
        )
        await self._check_room(issuer.partition, record)
        start = Start(record, None, lane_of(self._pool, request.priority), key is not None)
        admitted_at = self._clock.monotonic()
        # No event of the generation can be stored before its request is queued.
        end = self._end(tenant, session, issuer, generation if key else None)
        try:
            created, (before, is_first) = await together(self._lookups.create(record), end)
        except BrokerUnavailable:
            self._withdrawals.add(start)
            raise
        start = start._replace(created=created)
        noted_at = self._clock.monotonic()
        cursor = issuer.issue(before)
        if created is None and not await self._is_waiting_repeat(record):
            return generation, cursor, True
        try:
            # A budget covers all sessions of its tenant: credentials limited to some must not see it.
            await self._admission.reserve(record, models, request, names_budget=principal.reaches_all)
        except (Problem, BrokerUnavailable):
            await self._take_back(start)
            raise
        await self._enqueue(start, request, issuer.partition)
        self._starts.began(record)
        metrics.ADMITTED.observe(admitted_at - asked_at)
        metrics.NOTED.observe(noted_at - admitted_at)
        metrics.QUEUED.observe(self._clock.monotonic() - noted_at)
        if created is not None:
            self._recent.add(record, issuer, before, is_first=is_first)
        return generation, cursor, created is None

    async def cancel(self, tenant: str, session: str, generation: str) -> str:
        """Request cancellation of a generation; return its state. Idempotent.

        The record is updated before the producer is notified, and a producer subscribes before it reads the record: so
        the producer of a request that is just leaving the queue learns of it either way.

        Raises:
            Unknown: the generation does not exist.
            BrokerUnavailable: the wish could not be noted.
        """
        await self._lookups.require(tenant, session, generation)
        for _ in range(CANCEL_TRIES):
            found = await self._lookups.get(tenant, session, generation)
            if found is None:
                break
            record, revision = found
            if record.state in ENDED:
                return record.state
            # Also for a running one: its producer may be lost, and the next one must find the cancellation.
            wanted = msgspec.structs.replace(record, state="cancelling")
            if record.state == "cancelling" or await self._lookups.update(wanted, revision):
                break
        try:
            answer = await self._broker.request(control_subject(tenant, session, generation), CANCEL)
        except BrokerUnavailable:
            answer = None  # its producer may have just ended; the record holds the cancellation
        if answer in (None, OVER):
            return await self._state_without_producer(tenant, session, generation)
        return "cancelling"

    async def _state_without_producer(self, tenant: str, session: str, generation: str) -> str:
        terminal = (await self._lookups.transcript(tenant, session, generation)).terminal
        return type_of(terminal) if terminal is not None else "cancelling"

    async def _candidates(self, model: str) -> list[str]:
        """Return the candidates for a model's name, as ``provider/model``; empty before any announcement."""
        announced = await self._lookups.models()
        if announced and not any(a.knows(model) for a in announced):
            names = dict.fromkeys(name for a in announced for name in a.names())
            raise Problem(
                422,
                f"model {model[:80]!r} is not known: use one of {', '.join(names)}",
                slug="unknown-model",
                title="The model is not known",
            )
        return [name for a in announced for name in a.candidates(model)]

    async def _check_room(self, partition: int, record: GenerationRecord) -> None:
        """Refuse new requests before the log is full, so that running generations can still end."""
        if (await self._states.state(partition)).used < LOG_FULL:
            return
        if await self._lookups.get(record.tenant, record.session, record.generation) is None:
            metrics.LOG_FULL.inc()
            raise Problem(
                503,
                "the log is full: it takes requests again when older events have expired",
                slug="log-full",
                title="The log is full",
                headers={"Retry-After": str(LOG_FULL_RETRY_SECONDS)},
            )

    async def _end(self, tenant: str, session: str, issuer: CursorIssuer, repeated: str | None) -> tuple[int, bool]:
        """Return the stream sequence before a new generation, or before the existing one of a repeated request.

        Also returns whether the log holds no event of the session.
        """
        reader = self._states.reader(tenant, session, issuer.partition)
        last, deleted = await together(
            self._broker.last(reader.stream, reader.filter), self._deleted.through(tenant, session, issuer)
        )
        if last is None:
            return deleted, True
        first = await reader.first_of(repeated) if repeated else None
        return last.seq if first is None else first - 1, False

    async def _is_waiting_repeat(self, record: GenerationRecord) -> bool:
        """Return whether an earlier request under the same key may not have reached the queue.

        Its record is then rewritten, so that the earlier request can no longer withdraw it.

        Raises:
            Problem: the earlier request had another body.
            BrokerUnavailable: the record existed and is gone: it is being stored or withdrawn.
        """
        seen: tuple[float, int] | None = None
        for _ in range(REPEAT_TRIES):
            found = await self._lookups.get(record.tenant, record.session, record.generation)
            if found is None:
                break
            earlier, revision = found
            if earlier.request_hash != record.request_hash:
                raise Problem(
                    422,
                    "this Idempotency-Key was used with another body",
                    slug="idempotency-conflict",
                    title="The key belongs to another request",
                )
            if earlier.state == "deleted":
                raise Problem(
                    410,
                    "this Idempotency-Key was used for a generation whose session was deleted: use another one",
                    slug="session-deleted",
                    title="The session was deleted",
                )
            if earlier.state != "queued":
                return False
            written_anew = seen is not None and seen[0] == earlier.created_at and seen[1] != revision
            if written_anew or await self._lookups.update(earlier, revision):  # by another repeat, or by this one
                return True
            seen = (earlier.created_at, revision)
        raise BrokerUnavailable("an earlier request under this key is about to be stored or taken back: ask again")

    async def _enqueue(self, start: Start, request: GenerationRequest, partition: int) -> None:
        record = start.record
        queued = Request(
            tenant=record.tenant,
            session=record.session,
            generation=record.generation,
            model=request.model,
            messages=request.messages,
            params=request.params,
            metadata=request.metadata,
            on_disconnect=request.on_disconnect,
            on_producer_loss=request.on_producer_loss,
            priority=request.priority,
            deadlines=request.deadlines,
            created_at=record.created_at,
            partition=partition,
            key=record.key,
            request_hash=record.request_hash,
        )
        data = msgspec.json.encode(queued)
        limit = self._broker.client.max_payload
        if len(data) > limit:
            await self._take_back(start)
            raise Problem(
                413,
                f"the request has {len(data)} bytes as it is queued, and at most {limit} bytes are taken: "
                "max_payload of the broker (nats-server) sets the limit",
            )
        subject = request_subject(start.lane, record.generation)
        try:
            await self._broker.publish_stored(subject, data)
        except APIError as error:
            if error.is_subject_taken:
                try:
                    await self._check_queued(subject)
                except BrokerUnavailable:
                    if start.created is not None:
                        self._withdrawals.add(start)
                    raise
                return
            await self._take_back(start)
            if not error.is_stream_full:
                raise _not_stored() from error
            raise Problem(
                429, "the queue of requests is full", slug="queue-full", headers={"Retry-After": "5"}
            ) from error
        except BrokerUnavailable:
            if start.created is not None:
                self._withdrawals.add(start)
            raise
        metrics.REQUESTS.inc()

    async def _check_queued(self, subject: str) -> None:
        """Check that an earlier request is in the queue: a leader without quorum refuses what it cannot store.

        Raises:
            BrokerUnavailable: it is not, or not yet.
        """
        if not await self._broker.holds(REQUESTS_STREAM, subject):
            raise BrokerUnavailable("an earlier request under this key is not in the queue yet: ask again")

    async def _take_back(self, start: Start) -> None:
        """Withdraw a request that could not be queued, unless another one under the same key uses its record."""
        try:
            if start.created is not None and await self._lookups.forget(start.record, start.created):
                await self._admission.release(start.record)
        except BrokerUnavailable:
            self._withdrawals.add(start)


def _not_stored() -> Problem:
    return Problem(
        503,
        "the broker does not store what it is sent: its disk may be full",
        slug="log-refuses",
        title="The log takes nothing",
        headers={"Retry-After": str(STORAGE_RETRY_SECONDS)},
    )


def _name(tenant: str, session: str, key: str | None) -> str:
    if key is None:
        return "gen_" + secrets.token_hex(12)
    digest = hashlib.sha256(f"{tenant}\0{session}\0{key}".encode()).digest()
    return "gen_" + b32encode(digest)[:26].decode().lower()
