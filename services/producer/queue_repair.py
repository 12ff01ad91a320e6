"""Looks after the work queue's consumers: one whose position is beyond the queue would give nothing to anybody."""

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from schemas.topology import ConsumerSpec
from services.kit.broker import Broker, BrokerUnavailable
from services.kit.consumers import DurableRefused, Durables

__all__ = ["QueueRepair"]

log = structlog.get_logger()
LOOK_SECONDS: Final = 5.0


class QueueRepair:
    """Makes a lane's consumer anew when it is missing, or has passed requests over that the queue still holds.

    That happens when the queue's files are damaged: the broker then uses stream sequences again that its consumer has
    behind it. Requests that run are then given once more; who runs them takes no notice, and the log decides elsewhere.
    """

    def __init__(self, broker: Broker, lanes: Sequence[ConsumerSpec]) -> None:
        self._broker = broker
        self._lanes = lanes
        self._durables = Durables(broker)
        self._passed: set[str] = set()  # consumers that seemed to have passed requests over when looked at last

    async def run(self) -> None:
        """Look at the consumers until cancelled."""
        while True:
            if self._broker.is_connected:
                for lane in self._lanes:
                    await self._try(lane)
            await asyncio.sleep(LOOK_SECONDS)

    async def _try(self, lane: ConsumerSpec) -> None:
        try:
            await self.look(lane)
        except (BrokerUnavailable, DurableRefused) as error:
            log.warning("queue not looked at", consumer=lane.durable, detail=str(error))

    async def look(self, lane: ConsumerSpec) -> None:
        """Look at one lane's consumer.

        Raises:
            BrokerUnavailable: the broker does not answer.
            DurableRefused: it refuses the consumer.
        """
        await self._durables.mend(lane)
        before = await self._durables.info(lane.stream, lane.durable)
        if before is None or before.num_pending or await self._broker.is_replicated(lane.stream):
            self._passed.discard(lane.durable)
            return
        waiting = await self._broker.count(lane.stream, lane.filter)
        after = await self._durables.info(lane.stream, lane.durable)
        known = max(info.num_pending + info.num_ack_pending for info in (before, after or before))
        if waiting <= known:
            self._passed.discard(lane.durable)
        elif lane.durable not in self._passed:
            self._passed.add(lane.durable)  # requests come and go while this looks: it must be seen twice
        else:
            self._passed.discard(lane.durable)
            await self._durables.reset(lane)
