"""The leases of the requests that a process holds: renewed, lapsed in a silence of the broker, held again, or lost.

The queue's redelivery is the lease, and a silence of the broker looks to it like the death of a producer. So a lease
that has lapsed is not lost yet. While it is lapsed nothing is published; once the broker answers again, the record of
who has begun the request last decides (`services.producer.adapters.claims`). A producer that is given a request again
asks whoever has begun it before it does so itself.
"""

import asyncio
from contextlib import suppress
from typing import Final

import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from schemas.holders import HELD, asked_claim, holder_question
from schemas.subjects import Address, holder_subject
from services.kit.broker import Broker, BrokerUnavailable
from services.producer import metrics
from services.producer.adapters.claims import Claim, Claims
from services.producer.adapters.publisher import Lease, Publisher

__all__ = ["HeldRequest", "Leases"]

log = structlog.get_logger()
RENEW_SECONDS: Final = 2.0
RENEW_PAUSE: Final = 0.25
CONFIRM_SECONDS: Final = 1.5
ASK_SECONDS: Final = 2.0
"""Longer than `CONFIRM_SECONDS`: a holder whose lease has lapsed renews it before it answers."""
SETTLE_SECONDS: Final = 2.0
"""How long after a reconnection another producer may still be on its way back."""


class HeldRequest:
    """A request that this process holds. ``claim``: what says that it was begun here; ``None`` before."""

    __slots__ = ("address", "claim", "lease", "questions", "reply")

    def __init__(self, address: Address, reply: str, lease: Lease) -> None:
        self.address = address
        self.reply = reply
        self.lease = lease
        self.claim: Claim | None = None
        self.questions: Subscription | None = None


class Leases:
    """The requests that a process holds. ``seconds``: how long after the last renewal the queue gives one again."""

    def __init__(self, broker: Broker, publisher: Publisher, tries: Claims, seconds: float) -> None:
        self._broker = broker
        self._publisher = publisher
        self._tries = tries
        self._seconds = seconds
        self._held: dict[Address, HeldRequest] = {}  # also those that wait for a slot; bounded by twice the slots
        self._settled_at = 0.0
        broker.on_reconnect(self._reconnected)

    def begin(self, asked_at: float) -> Lease:
        """Return the lease of a request that the queue was asked for at that event-loop time."""
        return Lease(asked_at + self._seconds * 0.9)

    def hold(self, address: Address, reply: str, lease: Lease) -> HeldRequest | None:
        """Hold a request and renew its lease until `release`; ``None`` when it is held here already.

        A queue that was killed or silent gives again what runs: our renewals and our answer count for that copy too.
        """
        held = self._held.get(address)
        if held is not None and not held.lease.is_lost:
            return None
        held = self._held[address] = HeldRequest(address, reply, lease)
        return held

    async def begun(self, held: HeldRequest, claim: Claim) -> None:
        """Note that a request has been begun here, and answer from now on that it is held."""
        held.claim = claim

        async def answer(msg: Msg) -> None:
            if asked_claim(msg.data) == claim.seq and await self.confirm(held):
                await self._broker.publish(msg.reply, HELD)

        address = held.address
        subject = holder_subject(address.tenant, address.session, address.generation)
        held.questions = await self._broker.subscribe(subject, answer)

    async def release(self, held: HeldRequest) -> None:
        """Hold a request no more; a successor's place stays."""
        if self._held.get(held.address) is held:
            del self._held[held.address]
        questions, held.questions = held.questions, None
        if questions is not None:
            with suppress(nats.errors.Error):  # the connection is closed, and with it the subscription
                await questions.unsubscribe()

    def holds(self, address: Address) -> bool:
        """Tell whether this process holds the request of a generation."""
        return address in self._held

    def everything(self) -> list[HeldRequest]:
        """Return all that is held."""
        return list(self._held.values())

    async def keep(self) -> None:
        """Renew the leases; runs until cancelled."""
        while True:
            await asyncio.sleep(self._seconds / 3)
            await asyncio.gather(*(self._renew(held) for held in self.everything()))

    async def confirm(self, held: HeldRequest) -> bool:
        """Tell whether a request is still held; a lease that has lapsed is renewed first, if that can be."""
        if held.lease.is_over():
            try:
                async with asyncio.timeout(CONFIRM_SECONDS):
                    await self._renew(held)
            except TimeoutError:
                return False
        return self._held.get(held.address) is held and not held.lease.is_over()

    async def is_held_elsewhere(self, address: Address, claim: Claim) -> bool:
        """Ask the producer that has begun a request, as ``claim`` says, whether it goes on with it.

        One that has died does not answer. One that was cut off together with this process may come back a little later.
        """
        loop = asyncio.get_running_loop()
        subject = holder_subject(address.tenant, address.session, address.generation)
        while True:
            try:
                answer = await self._broker.request(subject, holder_question(claim.seq), timeout=ASK_SECONDS)
            except BrokerUnavailable:
                return False
            if answer is not None or loop.time() > self._settled_at:
                return answer == HELD
            await asyncio.sleep(RENEW_PAUSE)

    async def _reconnected(self) -> None:
        self._settled_at = asyncio.get_running_loop().time() + SETTLE_SECONDS

    async def _renew(self, held: HeldRequest) -> None:
        """Ask until the queue has heard it: while it finds a new leader, nobody answers for up to 10 s."""
        loop = asyncio.get_running_loop()
        while self._held.get(held.address) is held and not held.lease.is_lost:
            asked, has_lapsed = loop.time(), held.lease.is_over()
            try:
                answer = await self._broker.request(held.reply, b"+WPI", timeout=RENEW_SECONDS)
                if answer is not None and (not has_lapsed or await self._is_ours(held)):
                    held.lease.until = asked + self._seconds * 0.9
                    if has_lapsed:
                        self._resume(held)
                    return
            except BrokerUnavailable as error:
                log.warning("lease not renewed", detail=str(error))
            await asyncio.sleep(RENEW_PAUSE)

    async def _is_ours(self, held: HeldRequest) -> bool:
        """Tell whether nobody has begun a request since it was begun here; the lease is lost otherwise.

        Raises:
            BrokerUnavailable: the record cannot be read.
        """
        if held.claim is not None and await self._tries.is_last(held.address, held.claim):
            return True
        held.lease.is_lost = True
        return False

    def _resume(self, held: HeldRequest) -> None:
        metrics.LEASES_RESUMED.inc()
        log.info("lease had lapsed and is held again", generation=held.address.generation)
        self._publisher.resume(held.lease)
