"""After a log has lost something: closes what is left of generations without their end."""

import asyncio
from typing import Final

import structlog

from schemas.requests import GenerationRecord
from schemas.subjects import Address, InvalidSubject, parse_address, partition_filter
from schemas.topology import token_stream
from services.kit.broker import BrokerUnavailable
from services.kit.logs import Logs
from services.producer.core.takeover import Begun
from services.producer.errors import ProducerError
from services.producer.lost_requests import LostRequests
from services.producer.relay import LOG_LOST, RelayContext, read_begun

__all__ = ["LogRepair"]

log = structlog.get_logger()
LOOK_SECONDS: Final = 5.0


class LogRepair:
    """Reads a log once that has lost something, and gives each generation an end that has none and that nobody runs.

    Otherwise their readers would wait for ever: for events behind a hole, or for a terminal that was lost.
    """

    def __init__(self, context: RelayContext, logs: Logs, orphans: LostRequests) -> None:
        self._context = context
        self._broker = context.broker
        self._logs = logs
        self._orphans = orphans

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not self._broker.is_connected:
                continue
            try:
                await self.look()
            except (BrokerUnavailable, ProducerError) as error:
                log.warning("log not repaired yet", detail=str(error))

    async def look(self) -> None:
        """Repair the logs that have lost something since they were repaired.

        Raises:
            BrokerUnavailable: the broker does not answer.
            ProducerError: the log does not take a terminal now.
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
        for subject in [subject for subject, known in begun.items() if known.lost_beginning]:
            begun[subject] = await read_begun(self._broker, token_stream(partition), subject)
        open_ = [subject for subject, known in begun.items() if not known.position.ended]
        closed = 0
        for address in _addresses(open_):
            if not await self._orphans.is_cared_for(address):
                closed += await self._orphans.close(address, await self._record(address), LOG_LOST)
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
