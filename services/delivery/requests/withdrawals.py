"""Withdraw refused requests of which the broker may have stored a part."""

import asyncio
from typing import Final, NamedTuple

import msgspec
import structlog

from schemas.control import CANCEL
from schemas.requests import GenerationRecord, Request
from schemas.subjects import control_subject, request_subject
from schemas.topology import REQUESTS
from services.delivery import metrics
from services.delivery.requests.budgets import BudgetReservations
from services.delivery.requests.generations import Lookups
from services.kit.jetstream.broker import Broker, BrokerUnavailable, Stored
from services.kit.jetstream.errors import APIError

__all__ = ["Start", "Withdrawals"]

log = structlog.get_logger()
WAITING: Final = 10_000
PAUSE_SECONDS: Final = 1.0
LATER_SECONDS: Final = 5.0
"""Seconds after a withdrawal until it is checked again: a producer may have just taken the request."""


class Start(NamedTuple):
    """A request on its way into the queue.

    ``created``: revision of the record it created, or None where that is unknown or the record is an earlier request's.
    ``repeatable``: it has an idempotency key, so its client may repeat it on any replica.
    """

    record: GenerationRecord
    created: int | None
    lane: str
    repeatable: bool


class _Refused(NamedTuple):
    """``due``: time of the second check, 0 before the first."""

    start: Start
    due: float


class Withdrawals:
    """Withdraw refused requests until the broker holds no record, no queue entry and no producer of them.

    A request repeated meanwhile under its idempotency key is left unchanged. A producer that took a refused request
    is cancelled only if there is no key: under a key the repeat may have been accepted by another replica, and its
    answer must go on. If the replica ends first, producers close the records of the remaining requests.
    """

    def __init__(self, broker: Broker, lookups: Lookups, admission: BudgetReservations) -> None:
        self._broker = broker
        self._lookups = lookups
        self._admission = admission
        self._waiting: dict[str, _Refused] = {}  # by generation; bounded by WAITING
        self._task: asyncio.Task[None] | None = None

    def add(self, start: Start) -> None:
        """Withdraw a request once the broker answers."""
        if len(self._waiting) >= WAITING:
            metrics.WITHDRAWN.labels("forgotten").inc()
            return
        self._waiting[start.record.generation] = _Refused(start, 0.0)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Process waiting requests until there are none."""
        while self._waiting:
            await asyncio.sleep(PAUSE_SECONDS)
            now = asyncio.get_running_loop().time()
            for name, refused in list(self._waiting.items()):
                if not self._broker.is_connected:
                    break
                try:
                    if refused.due == 0.0:
                        await self._withdraw(refused.start)
                        self._waiting[name] = refused._replace(due=now + LATER_SECONDS)
                    elif now >= refused.due:
                        if not refused.start.repeatable:
                            await self._cancel(refused.start.record)
                        del self._waiting[name]
                except (BrokerUnavailable, APIError) as error:
                    log.warning("refused request not taken back yet", generation=name, detail=str(error))
                    break  # the others would fail the same way

    async def _withdraw(self, start: Start) -> None:
        record, created, lane, _ = start
        found = await self._lookups.get(record.tenant, record.session, record.generation)
        if found is not None and (found[0].created_at, found[0].state) != (record.created_at, "queued"):
            return  # a producer has it
        queued = await self._queued(record, lane)
        if queued is not None and queued[1] != record.created_at:
            return  # it was repeated, and the repeat is in the queue
        if queued is not None and not await self._broker.delete(REQUESTS, queued[0].seq):
            raise BrokerUnavailable("the request has just left the queue: its record tells in a moment who has it")
        if found is not None and not await self._lookups.forget(record, created or found[1]):
            if queued is not None:  # repeated just now, and the repeat relies on the queue entry
                await self._put_back(record, lane, queued[0].data)
            return
        await self._admission.release(record)
        metrics.WITHDRAWN.labels("withdrawn").inc()
        log.info("refused request taken back", session=record.session, generation=record.generation)

    async def _queued(self, record: GenerationRecord, lane: str) -> tuple[Stored, float] | None:
        """Return the queued message under the request's name, and its creation time."""
        stored = await self._broker.last(REQUESTS, request_subject(lane, record.generation))
        if stored is None:
            return None
        try:
            return stored, msgspec.json.decode(stored.data, type=Request).created_at
        except msgspec.DecodeError:
            return stored, 0.0

    async def _put_back(self, record: GenerationRecord, lane: str, data: bytes) -> None:
        try:
            await self._broker.publish_stored(request_subject(lane, record.generation), data)
        except APIError as error:
            if not error.is_subject_taken:
                raise

    async def _cancel(self, record: GenerationRecord) -> None:
        """Cancel the generation if a producer took the request before it was removed."""
        found = await self._lookups.get(record.tenant, record.session, record.generation)
        if found is not None and found[0].created_at == record.created_at:
            await self._broker.request(control_subject(record.tenant, record.session, record.generation), CANCEL)
