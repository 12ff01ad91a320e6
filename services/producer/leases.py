"""Renew the leases of the requests that a process holds; resume those that lapsed while the broker was silent.

The queue's redelivery is the lease, and the queue cannot tell a silent broker from a dead producer. So a lapsed lease
is not lost yet: nothing is published while it is lapsed, and once the broker answers again, the last claim decides
(`services.producer.adapters.claims`). A producer that receives a redelivered request asks the holder of its claim
before it claims the request itself.
"""

import asyncio
from typing import Final

import structlog

from schemas.holders import HELD, asked_claim, holder_question
from schemas.subjects import Address, holder_subject
from services.kit.jetstream.ack import IN_PROGRESS
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.connection import Subscription
from services.kit.tasks import BackgroundTasks
from services.producer import metrics
from services.producer.adapters.claims import Claim, Claims
from services.producer.adapters.publisher import Lease, Publisher

__all__ = ["HeldRequest", "Leases"]

log = structlog.get_logger()
RENEW_SECONDS: Final = 2.0
RENEW_PAUSE: Final = 0.25
CONFIRM_SECONDS: Final = 1.5
ASK_SECONDS: Final = 2.0
"""Longer than `CONFIRM_SECONDS`: a holder renews a lapsed lease before it answers."""
SETTLE_SECONDS: Final = 2.0
"""Seconds after a reconnection within which another producer may still reconnect."""


class HeldRequest:
    """A request that this process holds. ``claim``: this process's claim on it; ``None`` before it is begun."""

    __slots__ = ("address", "claim", "lease", "questions", "reply")

    def __init__(self, address: Address, reply: str, lease: Lease) -> None:
        self.address = address
        self.reply = reply
        self.lease = lease
        self.claim: Claim | None = None
        self.questions: Subscription | None = None


class Leases:
    """Keep the leases of a process. ``seconds``: time from a renewal to the queue's redelivery of the request."""

    def __init__(self, broker: Broker, publisher: Publisher, claims: Claims, seconds: float) -> None:
        self._broker = broker
        self._publisher = publisher
        self._claims = claims
        self._seconds = seconds
        self._held: dict[Address, HeldRequest] = {}  # also those that wait for a slot; bounded by twice the slots
        self._answers = BackgroundTasks()  # each for CONFIRM_SECONDS at most
        self._settled_at = 0.0
        broker.on_reconnect(self._reconnected)

    def begin(self, asked_at: float) -> Lease:
        """Return the lease of a request that was pulled at the event-loop time ``asked_at``."""
        return Lease(asked_at + self._seconds * 0.9)

    def hold(self, address: Address, reply: str, lease: Lease) -> HeldRequest | None:
        """Hold a request and renew its lease until `release`; return ``None`` if it is held here already.

        A queue that was killed or silent redelivers running requests; renewals and answer count for that copy too.
        """
        held = self._held.get(address)
        if held is not None and not held.lease.is_lost:
            return None
        held = self._held[address] = HeldRequest(address, reply, lease)
        return held

    async def begun(self, held: HeldRequest, claim: Claim) -> None:
        """Record the claim on a request, and answer other producers from now on that it is held here."""
        held.claim = claim

        async def confirm(reply: str) -> None:
            if await self.confirm(held):
                await self._broker.publish(reply, HELD)

        def answer(data: bytes, reply: str) -> None:
            if reply and asked_claim(data) == claim.seq:
                self._answers.start(confirm(reply), name="holder")

        address = held.address
        subject = holder_subject(address.tenant, address.session, address.generation)
        held.questions = await self._broker.respond(subject, answer)

    async def release(self, held: HeldRequest) -> None:
        """Stop holding a request; keep a newer delivery of it that is held by now."""
        if self._held.get(held.address) is held:
            del self._held[held.address]
        questions, held.questions = held.questions, None
        if questions is not None:
            await self._broker.unlisten(questions)

    def holds(self, address: Address) -> bool:
        """Return whether this process holds the request of a generation."""
        return address in self._held

    def held(self) -> list[HeldRequest]:
        """Return the held requests."""
        return list(self._held.values())

    async def keep(self) -> None:
        """Renew the leases; runs until cancelled."""
        while True:
            await asyncio.sleep(self._seconds / 3)
            await asyncio.gather(*(self._renew(held) for held in self.held()))

    async def confirm(self, held: HeldRequest) -> bool:
        """Return whether a request is still held, after an attempt to renew a lease that has lapsed."""
        if held.lease.is_over():
            try:
                async with asyncio.timeout(CONFIRM_SECONDS):
                    await self._renew(held)
            except TimeoutError:
                return False
        return self._held.get(held.address) is held and not held.lease.is_over()

    async def is_held_elsewhere(self, address: Address, claim: Claim) -> bool:
        """Ask the producer with this claim whether it still runs the request.

        A dead producer does not answer. One that was cut off together with this one may reconnect a little later.
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
        """Renew a lease; retry until the queue answers: while it elects a leader it is silent for up to 10 s."""
        loop = asyncio.get_running_loop()
        while self._held.get(held.address) is held and not held.lease.is_lost:
            asked, has_lapsed = loop.time(), held.lease.is_over()
            try:
                answer = await self._broker.request(held.reply, IN_PROGRESS, timeout=RENEW_SECONDS)
                if answer is not None and (not has_lapsed or await self._is_ours(held)):
                    held.lease.until = asked + self._seconds * 0.9
                    if has_lapsed:
                        self._resume(held)
                    return
            except BrokerUnavailable as error:
                log.warning("lease not renewed", detail=str(error))
            await asyncio.sleep(RENEW_PAUSE)

    async def _is_ours(self, held: HeldRequest) -> bool:
        """Return whether the claim on a request is still the last one; mark the lease as lost otherwise.

        Raises:
            BrokerUnavailable: the record cannot be read.
        """
        if held.claim is not None and await self._claims.is_last(held.address, held.claim):
            return True
        held.lease.is_lost = True
        return False

    def _resume(self, held: HeldRequest) -> None:
        metrics.LEASES_RESUMED.inc()
        log.info("lapsed lease resumed", generation=held.address.generation)
        self._publisher.resume(held.lease)
