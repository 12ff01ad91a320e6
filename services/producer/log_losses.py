"""Detect that the log has lost acknowledged events of running answers, after each reconnection to the broker."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog

from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.logs import Logs
from services.producer.errors import TryAgain
from services.producer.relay import Relay

__all__ = ["LogLosses"]

log = structlog.get_logger()
AT_ONCE: Final = 16
POLL_SECONDS: Final = 1.0
"""Interval of the checks. The relay compares once more when an answer ends."""


class LogLosses:
    """Compare the acknowledged events of running answers with those in the log.

    A log that lost acknowledged events has a gap that no reader can pass: such an answer is interrupted and taken over
    from the remaining events, as after the loss of its producer.
    """

    def __init__(self, broker: Broker, running: Callable[[], Sequence[Relay]]) -> None:
        self._broker = broker
        self._running = running
        self.logs = Logs(broker)
        self._incarnations: dict[int, str] = {}  # by partition, of logs in which a generation has run

    async def run(self) -> None:
        """Check the incarnations of the logs, and compare after each change or reconnection, until cancelled."""
        compared = self._broker.reconnects
        while True:
            await asyncio.sleep(POLL_SECONDS)
            connection, relays = self._broker.reconnects, list(self._running())
            if not self._broker.is_connected or not relays:
                continue
            try:
                changed = await self._changed({relay.address.partition for relay in relays})
                if connection != compared or changed:
                    await self._compare(relays, changed)
                compared = connection
            except (BrokerUnavailable, TryAgain) as error:
                log.warning("running answers not compared with the log", detail=str(error))

    async def learn(self, partition: int) -> None:
        """Record the incarnation of a log before a generation runs in it.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        if partition not in self._incarnations:
            self._incarnations[partition] = (await self.logs.state(partition)).incarnation

    async def _changed(self, partitions: Iterable[int]) -> set[int]:
        """Return the partitions whose log has another incarnation than before."""
        changed = set()
        for partition in partitions:
            before, now = self._incarnations.get(partition), (await self.logs.state(partition)).incarnation
            if before != now:
                changed.add(partition)
        return changed

    async def _compare(self, relays: Sequence[Relay], changed: set[int]) -> None:
        for first in range(0, len(relays), AT_ONCE):
            part = relays[first : first + AT_ONCE]
            await asyncio.gather(*(relay.compare(whole=relay.address.partition in changed) for relay in part))
        for partition in changed:
            self._incarnations[partition] = (await self.logs.state(partition)).incarnation
