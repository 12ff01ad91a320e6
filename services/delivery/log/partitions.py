"""Find the partition of a session, across changes of the number of partitions."""

from typing import Final

from schemas.partitions import HISTORY_SUBJECT, candidates, decode_history, settled
from schemas.subjects import log_filter
from schemas.topology import REGISTRY_BUCKET, bucket_stream, token_stream
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker

__all__ = ["Partitions"]

HISTORY_SECONDS: Final = 5.0


class Partitions:
    """Find the partition of a session. ``count``: the partition count used when no history is stored."""

    def __init__(self, broker: Broker, clock: Clock, count: int) -> None:
        self._broker = broker
        self._clock = clock
        self._history: tuple[int, ...] = (count,)
        self._read_at: float | None = None

    async def of(self, tenant: str, session: str) -> int:
        """Return the partition that keeps a session, without a look-up if only one is possible.

        Raises:
            BrokerUnavailable: the history or a log cannot be read.
        """
        options = candidates(tenant, session, await self.history())
        for older in reversed(options[1:]):
            if await self._broker.last(token_stream(older), log_filter(older, tenant, session)) is not None:
                return settled(options, (older,))
        return options[0]

    async def is_settled(self, tenant: str, session: str, partition: int) -> bool:
        """Return whether only another change of the number of partitions can move the session."""
        return candidates(tenant, session, await self.history())[0] == partition

    async def history(self) -> tuple[int, ...]:
        """Return the history of partition counts, oldest first, at most `HISTORY_SECONDS` old.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        now = self._clock.monotonic()
        if self._read_at is None or now - self._read_at > HISTORY_SECONDS:
            stored = await self._broker.last(bucket_stream(REGISTRY_BUCKET), HISTORY_SUBJECT)
            if stored is not None:
                self._history = decode_history(stored.data)
            self._read_at = now
        return self._history
