"""Repair the work queue's consumers: one whose position is beyond the queue would deliver nothing."""

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from schemas.topology import ConsumerSpec
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.consumer import Durables
from services.kit.jetstream.errors import APIError

__all__ = ["QueueRepair"]

log = structlog.get_logger()
POLL_SECONDS: Final = 5.0


class QueueRepair:
    """Recreate a lane's consumer that is missing, or has skipped requests that the queue still holds.

    Cause: damaged queue files, after which the broker reuses stream sequences that the consumer has passed. Running
    requests are delivered once more; their producer ignores that, and for any other producer the log decides.
    """

    def __init__(self, broker: Broker, lanes: Sequence[ConsumerSpec]) -> None:
        self._broker = broker
        self._lanes = lanes
        self._durables = Durables(broker)
        self._passed: set[str] = set()  # consumers that seemed to have skipped requests at the last check

    async def run(self) -> None:
        """Check the consumers until cancelled."""
        while True:
            if self._broker.is_connected:
                for lane in self._lanes:
                    await self._try(lane)
            await asyncio.sleep(POLL_SECONDS)

    async def _try(self, lane: ConsumerSpec) -> None:
        try:
            await self.check(lane)
        except (BrokerUnavailable, APIError) as error:
            log.warning("queue not checked", consumer=lane.durable, detail=str(error))

    async def check(self, lane: ConsumerSpec) -> None:
        """Check one lane's consumer; recreate it if it has skipped requests at two checks in a row.

        Raises:
            BrokerUnavailable: the broker does not answer.
            APIError: it refuses the consumer.
        """
        await self._durables.mend(lane)
        before = await self._durables.info(lane.stream, lane.durable)
        if before is None or before.num_pending or await self._broker.is_replicated(lane.stream):
            self._passed.discard(lane.durable)
            return
        waiting = await self._broker.count(lane.stream, lane.filter)
        after = await self._durables.info(lane.stream, lane.durable)
        counted = max(info.num_pending + info.num_ack_pending for info in (before, after or before))
        if waiting <= counted:
            self._passed.discard(lane.durable)
        elif lane.durable not in self._passed:
            self._passed.add(lane.durable)  # requests come and go meanwhile: confirm at the next check
        else:
            self._passed.discard(lane.durable)
            await self._durables.reset(lane)
