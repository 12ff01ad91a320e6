"""Repair a log that has lost events: close generations that are left without a terminal."""

from typing import Final

import structlog

from schemas.requests import GenerationRecord
from schemas.subjects import Address, InvalidSubject, parse_address, partition_filter
from schemas.topology import token_stream
from services.kit.jetstream.logs import Logs
from services.producer.core.takeover import Begun
from services.producer.lost_requests import LostRequests
from services.producer.polling import poll_every
from services.producer.relay import LOG_LOST, RelayContext, read_begun

__all__ = ["LogRepair"]

log = structlog.get_logger()
POLL_SECONDS: Final = 5.0


class LogRepair:
    """Read a log once after it has lost events, and close each generation that has no terminal and no producer.

    Otherwise its readers would wait for ever, for events after a gap or for a lost terminal.
    """

    def __init__(self, context: RelayContext, logs: Logs, lost: LostRequests) -> None:
        self._context = context
        self._broker = context.broker
        self._logs = logs
        self._lost = lost

    async def run(self) -> None:
        """Poll until cancelled."""
        await poll_every(POLL_SECONDS, self._broker, self.poll, "log not repaired")

    async def poll(self) -> None:
        """Repair the logs that have lost events since their last repair.

        Raises:
            BrokerUnavailable: the broker does not answer.
            ProducerError: the log refuses a terminal now.
        """
        for partition in await self._broker.partitions():
            state = await self._logs.state(partition)
            if not state.repaired:
                await self._repair(partition)
                await self._logs.repaired(partition, state.incarnation)

    async def _repair(self, partition: int) -> None:
        begun: dict[str, Begun] = {}  # bounded by what the log keeps
        async for batch in self._broker.read(token_stream(partition), partition_filter(partition)):
            for stored in batch:
                begun.setdefault(stored.subject, Begun()).take(stored.data, stored.seq)
        for subject in [subject for subject, state in begun.items() if state.lost_beginning]:
            begun[subject] = await read_begun(self._broker, token_stream(partition), subject)
        open_ = [subject for subject, state in begun.items() if not state.position.ended]
        closed = 0
        for address in _addresses(open_):
            if not await self._lost.has_request(address):
                closed += await self._lost.close(address, await self._record(address), LOG_LOST)
        log.warning("log repaired", partition=partition, generations=len(begun), closed=closed)

    async def _record(self, address: Address) -> GenerationRecord:
        names = (address.tenant, address.session, address.generation)
        found = await self._context.records.get(*names)
        if found is not None:
            return found
        return GenerationRecord(
            tenant=address.tenant,
            session=address.session,
            generation=address.generation,
            state="running",
            model="",
            created_at=self._context.clock.wall(),
        )


def _addresses(subjects: list[str]) -> list[Address]:
    found = []
    for subject in subjects:
        try:
            found.append(parse_address(subject))
        except InvalidSubject:
            continue
    return found
