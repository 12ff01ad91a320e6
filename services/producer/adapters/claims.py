"""How often a request has been begun: the queue's own count holds deliveries too that nobody could begin."""

import asyncio
from typing import Final, NamedTuple, overload

import structlog
from nats.js.errors import APIError

from schemas.subjects import Address, generation_key
from schemas.topology import BUCKET, bucket_stream
from services.kit.broker import Broker, BrokerUnavailable
from services.producer.adapters.publisher import WRONG_LAST_SEQUENCE
from services.producer.errors import GiveUp

__all__ = ["Claim", "Claims"]

log = structlog.get_logger()
EXCUSE_SECONDS: Final = 1.0


class Claim(NamedTuple):
    """How often a request has been begun, and the stream sequence of what says so (0: nothing does)."""

    begun: int
    seq: int


class Claims:
    """Counts beside the look-up records. A first delivery is not written down: a request that comes again was begun
    once, unless somebody has written otherwise.

    Who has begun a request last is the only one who may answer the queue for it: see `finish`. The queue itself takes
    the answer of anybody to whom it has ever given the request.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def before(self, address: Address, delivery: int) -> Claim:
        """Return how often the request has been begun before its delivery of this number (1, 2 …).

        Raises:
            BrokerUnavailable: the bucket does not answer.
        """
        if delivery == 1:
            return Claim(0, 0)
        stored = await self._broker.last(bucket_stream(BUCKET), _subject(address))
        if stored is None:
            return Claim(1, 0)
        return Claim(int(stored.data) if stored.data.isdigit() else 1, stored.seq)

    async def begin(self, address: Address, delivery: int, before: Claim) -> Claim:
        """Count a delivery as begun.

        Raises:
            BrokerUnavailable: the bucket does not take it.
        """
        if delivery == 1:
            return Claim(1, 0)
        return Claim(before.begun + 1, await self._write(address, before.begun + 1))

    async def is_last(self, address: Address, tried: Claim) -> bool:
        """Tell whether nobody has begun the request since ``tried``, as far as the bucket's leader knows.

        Raises:
            BrokerUnavailable: the bucket does not answer.
        """
        stored = await self._broker.last(bucket_stream(BUCKET), _subject(address))
        return (stored.seq if stored is not None else 0) == tried.seq

    async def finish(self, address: Address, tried: Claim) -> None:
        """Close the request to whoever holds an earlier delivery of it.

        A write under a condition and no question: a node that leads no longer may answer a question as if it did.

        Raises:
            GiveUp: another producer has begun it since ``tried``; it has the last word.
            BrokerUnavailable: the bucket does not take it.
        """
        if await self._write(address, tried.begun, tried.seq) is None:
            raise GiveUp(f"another producer has begun {address.generation} meanwhile")

    async def excuse(self, address: Address, before: Claim, now: Claim) -> None:
        """Let a delivery not count after all, if the bucket takes that in a moment and nobody has begun it since."""
        try:
            async with asyncio.timeout(EXCUSE_SECONDS):
                await self._write(address, before.begun, now.seq)
        except (BrokerUnavailable, TimeoutError) as error:
            log.warning(
                "delivery counts although it was not at fault", generation=address.generation, detail=str(error)
            )

    @overload
    async def _write(self, address: Address, begun: int) -> int: ...
    @overload
    async def _write(self, address: Address, begun: int, after: int) -> int | None: ...
    async def _write(self, address: Address, begun: int, after: int | None = None) -> int | None:
        """Write a count, and return its stream sequence; ``after``: only behind that one, else ``None``."""
        headers = None if after is None else {"Nats-Expected-Last-Subject-Sequence": str(after)}
        try:
            return await self._broker.publish_stored(_subject(address), b"%d" % begun, headers=headers)
        except APIError as error:
            if error.err_code in WRONG_LAST_SEQUENCE:
                return None
            raise BrokerUnavailable(f"the bucket refuses: {error.description}") from error


def _subject(address: Address) -> str:
    # One token more than a record's key has, so that no list of records finds it.
    return f"$KV.{BUCKET}.{generation_key(address.tenant, address.session, address.generation)}.tries"
