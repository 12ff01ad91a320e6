"""Claims: which producer may run a request, and how many have begun it.

The queue's own delivery count also holds deliveries that no producer could begin.
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
    """How many producers have begun a request, and the stream sequence of the record of that (0: no record)."""

    begun: int
    seq: int


class Claims:
    """Keep the claim of each request beside its look-up record.

    The claim of a first delivery is not stored: a redelivered request without a record was begun once. The producer
    that claimed a request last is the only one that may answer the queue for it (`seal`), for the queue accepts the
    answer of every producer to which it has ever delivered the request.
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
        """Return whether no producer has claimed the request after ``claim``, as far as the bucket's leader knows.

        Raises:
            BrokerUnavailable: the bucket does not answer.
        """
        stored = await self._broker.last(bucket_stream(BUCKET), _subject(address))
        return (stored.seq if stored is not None else 0) == claim.seq

    async def seal(self, address: Address, claim: Claim) -> None:
        """Invalidate all earlier claims by a conditional write.

        A read would not do: a node that no longer leads may answer a read as if it did.

        Raises:
            GiveUp: another producer has claimed the request after ``claim``; it has the last word.
            BrokerUnavailable: the bucket does not take it.
        """
        if await self._write(address, claim.begun, claim.seq) is None:
            raise GiveUp(f"another producer has begun {address.generation} meanwhile")

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
        """Store a count and return its stream sequence; ``None`` if ``after`` is not the last sequence any more."""
        headers = None if after is None else expecting(after)
        try:
            return await self._broker.publish_stored(_subject(address), b"%d" % begun, headers=headers)
        except APIError as error:
            if error.is_wrong_last_sequence:
                return None
            raise BrokerUnavailable(f"the bucket refuses: {error.description}") from error


def _subject(address: Address) -> str:
    # One token more than a record's key has, so that no list of records finds it.
    return f"$KV.{BUCKET}.{generation_key(address.tenant, address.session, address.generation)}.tries"
