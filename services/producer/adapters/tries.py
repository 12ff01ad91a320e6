"""How often a request has been begun: the queue's own count holds deliveries too that nobody could begin."""

import asyncio
from typing import Final

import structlog
from nats.js.errors import APIError

from schemas.subjects import Address, generation_key
from schemas.topology import BUCKET, bucket_stream
from services.kit.broker import Broker, BrokerUnavailable

__all__ = ["Tries"]

log = structlog.get_logger()
EXCUSE_SECONDS: Final = 1.0


class Tries:
    """Counts beside the look-up records. A first delivery is not written down: a request that comes again was begun
    once, unless somebody has written otherwise.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def begun(self, address: Address, delivery: int) -> int:
        """Return how often the request has been begun before its delivery of this number (1, 2 …).

        Raises:
            BrokerUnavailable: the bucket does not answer.
        """
        if delivery == 1:
            return 0
        stored = await self._broker.last(bucket_stream(BUCKET), _subject(address))
        return int(stored.data) if stored is not None and stored.data.isdigit() else 1

    async def begin(self, address: Address, delivery: int, begun: int) -> None:
        """Count a delivery as begun; ``begun`` is the count before.

        Raises:
            BrokerUnavailable: the bucket does not take it.
        """
        if delivery > 1:
            await self._write(address, begun + 1)

    async def excuse(self, address: Address, begun: int) -> None:
        """Let a delivery not count after all, if the bucket takes that in a moment."""
        try:
            async with asyncio.timeout(EXCUSE_SECONDS):
                await self._write(address, begun)
        except (BrokerUnavailable, TimeoutError) as error:
            log.warning(
                "delivery counts although it was not at fault", generation=address.generation, detail=str(error)
            )

    async def _write(self, address: Address, begun: int) -> None:
        try:
            await self._broker.publish_stored(_subject(address), b"%d" % begun)
        except APIError as error:
            raise BrokerUnavailable(f"the bucket refuses: {error.description}") from error


def _subject(address: Address) -> str:
    # One token more than a record's key has, so that no list of records finds it.
    return f"$KV.{BUCKET}.{generation_key(address.tenant, address.session, address.generation)}.tries"
