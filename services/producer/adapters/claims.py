"""Claims: the producer that may run a request, and the number of producers that have begun it.

The queue's own delivery count includes deliveries that no producer could begin.
"""

import asyncio
from typing import Final, NamedTuple, overload

import structlog

from schemas.subjects import Address, generation_key
from schemas.topology import BUCKET, bucket_stream
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.connection import expecting
from services.kit.jetstream.errors import APIError
from services.producer.errors import GiveUp

__all__ = ["Claim", "Claims"]

log = structlog.get_logger()
WITHDRAW_SECONDS: Final = 1.0


class Claim(NamedTuple):
    """The number of producers that have begun a request, and the stream sequence of its record (0: no record)."""

    begun: int
    seq: int


class Claims:
    """Store the claim of each request in the look-up bucket.

    The claim of a first delivery is not stored: a redelivered request without a record was begun once. Only the last
    claimant may answer the queue for a request (`seal`), because the queue accepts the answer of every producer to
    which it has ever delivered it.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def last(self, address: Address, delivery: int) -> Claim:
        """Return the last claim before a request's delivery with this number (1, 2 …).

        Raises:
            BrokerUnavailable: the bucket does not answer.
        """
        if delivery == 1:
            return Claim(0, 0)
        stored = await self._broker.last(bucket_stream(BUCKET), _subject(address))
        if stored is None:
            return Claim(1, 0)
        return Claim(int(stored.data) if stored.data.isdigit() else 1, stored.seq)

    async def claim(self, address: Address, delivery: int, before: Claim) -> Claim:
        """Claim a request for this producer, after the claim ``before``.

        Raises:
            BrokerUnavailable: the bucket does not take it.
        """
        if delivery == 1:
            return Claim(1, 0)
        return Claim(before.begun + 1, await self._write(address, before.begun + 1))

    async def is_last(self, address: Address, claim: Claim) -> bool:
        """Return whether ``claim`` is the last claim on the request, by the bucket's leader.

        Raises:
            BrokerUnavailable: the bucket does not answer.
        """
        stored = await self._broker.last(bucket_stream(BUCKET), _subject(address))
        return (stored.seq if stored is not None else 0) == claim.seq

    async def seal(self, address: Address, claim: Claim) -> None:
        """Invalidate all earlier claims by a conditional write.

        A read is not enough: a node that is no longer the leader may still answer it.

        Raises:
            GiveUp: another producer has claimed the request after ``claim``.
            BrokerUnavailable: the bucket does not take it.
        """
        if await self._write(address, claim.begun, claim.seq) is None:
            raise GiveUp(f"another producer has claimed {address.generation}")

    async def withdraw(self, address: Address, before: Claim, claim: Claim) -> None:
        """Restore the count of ``before``, at most for a second, unless another producer has claimed the request."""
        try:
            async with asyncio.timeout(WITHDRAW_SECONDS):
                await self._write(address, before.begun, claim.seq)
        except (BrokerUnavailable, TimeoutError) as error:
            log.warning("claim not withdrawn", generation=address.generation, detail=str(error))

    @overload
    async def _write(self, address: Address, begun: int) -> int: ...
    @overload
    async def _write(self, address: Address, begun: int, after: int) -> int | None: ...
    async def _write(self, address: Address, begun: int, after: int | None = None) -> int | None:
        """Store a count and return its stream sequence, or ``None`` if ``after`` is no longer the last sequence."""
        headers = None if after is None else expecting(after)
        try:
            return await self._broker.publish_stored(_subject(address), b"%d" % begun, headers=headers)
        except APIError as error:
            if error.is_wrong_last_sequence:
                return None
            raise BrokerUnavailable(f"the bucket refused the write: {error.description}") from error


def _subject(address: Address) -> str:
    # One token more than a record's key, so that no list of records contains it.
    return f"$KV.{BUCKET}.{generation_key(address.tenant, address.session, address.generation)}.tries"
