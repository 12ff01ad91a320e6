"""Take requests from the work queue, run a bounded number of them at a time, and answer the queue for each."""

import asyncio
from typing import Final

import msgspec
import structlog

from schemas.requests import Request
from schemas.subjects import lane_of
from schemas.topology import Topology
from services.kit.jetstream.ack import ACK, AT_ONCE, TERM, delivered, nak
from services.kit.jetstream.broker import BrokerUnavailable
from services.kit.shutdown import HAND_OVER, Stop, end
from services.kit.tasks import BackgroundTasks
from services.producer import metrics
from services.producer.adapters.claims import Claim, Claims
from services.producer.adapters.publisher import Lease
from services.producer.cancel import CancelListener
from services.producer.dead_requests import DeadRequests
from services.producer.errors import GiveUp, TryAgain
from services.producer.lane import LEAVE_SECONDS, Lane, QueueMessage
from services.producer.leases import HeldRequest, Leases
from services.producer.log_losses import LogLosses
from services.producer.log_repair import LogRepair
from services.producer.lost_requests import LostRequests
from services.producer.presence import Presence
from services.producer.queue_repair import QueueRepair
from services.producer.relay import HandBack, Relay, RelayContext

__all__ = ["Worker"]

log = structlog.get_logger()
WATCH_INTERVAL: Final = 0.1
EXCUSED_SECONDS: Final = 6 * 3_600.0
"""Age of a request up to which outages of the log do not count as attempts at it."""

_LATER: Final = nak(2.0)


class Worker:
    """Run up to ``slots`` generations at once. Batch requests leave a tenth of the slots to interactive ones.

    The queue's redelivery is the lease: ``lease`` seconds after the last heartbeat another producer gets the request.
    It is counted from the pull, which is never later than the delivery. A request that ``max_deliver`` producers have
    begun without success ends as poison.
    """

    def __init__(self, context: RelayContext, pool: str, slots: int, lease: float, max_deliver: int) -> None:
        self.context = context
        self.pool = pool
        self.slots = slots
        self._ack_wait = lease
        self.max_deliver = max_deliver
        self.running: dict[str, Relay] = {}  # by acknowledgement subject; bounded by the slots
        self._broker = context.broker
        self._claims = Claims(context.broker)
        self._cancels = CancelListener(context.broker)
        self._dead = DeadRequests(context, pool)
        self.leases = Leases(context.broker, context.publisher, self._claims, lease)
        self._is_leaving = False
        self._slot = asyncio.Semaphore(slots)
        self._tasks = BackgroundTasks()  # one for each request; bounded by the room that the lanes ask for
        self._lanes = [
            Lane(self._broker, lane_of(pool, "interactive"), self._room, self._take, lease=lease, patient=True),
            Lane(self._broker, lane_of(pool, "batch"), self._batch_room, self._take, lease=lease, patient=False),
        ]
        self._losses = LogLosses(self._broker, lambda: list(self.running.values()))
        self._presence = Presence(self._broker, context.clock, lambda: list(self.running.values()))
        metrics.SLOTS.set(slots)

    async def run(self, stop: Stop) -> None:
        """Work until ``stop``; then pull nothing more, let answers run for the drain time, and hand over the rest."""
        try:
            async with asyncio.TaskGroup() as group:
                lanes = [group.create_task(lane.run(), name="lane") for lane in self._lanes]
                queue = QueueRepair(self._broker, Topology(pool=self.pool, ack_wait=self._ack_wait).producers())
                lost = LostRequests(self.context, self.leases.holds, self._ack_wait)
                repair = LogRepair(self.context, self._losses.logs, lost)
                watches = [group.create_task(w) for w in (self.leases.keep(), self._watch(), self._presence.watch())]
                watches += [group.create_task(w) for w in (queue.run(), self._losses.run(), lost.run(), repair.run())]
                await stop.wait()
                self._is_leaving = True
                await end(*lanes, seconds=2 * LEAVE_SECONDS)
                await self._drain(stop)
                await end(*watches)
        finally:
            # An append whose outcome must be known may wait for a log without a leader: end that wait here.
            await end(*self._tasks, *self._cancels.tasks)

    async def _drain(self, stop: Stop) -> None:
        await self._hand_over_waiting()
        if self._tasks:
            log.warning("waiting for running answers to end", count=len(self._tasks), seconds=round(stop.left(), 1))
            await self._tasks.wait(stop.left())
        if self.running:
            log.warning("running answers interrupted and handed over", count=len(self.running))
        for relay in list(self.running.values()):
            relay.interruption.interrupt("drain", "drain")
        await self._tasks.wait(stop.left(HAND_OVER))

    async def _hand_over_waiting(self) -> None:
        """Hand over at once the requests that have no slot yet."""
        for held in self.leases.held():
            if held.reply not in self.running and not held.lease.is_over():
                held.lease.is_lost = True
                await self._publish(held.reply, AT_ONCE)

    def _room(self) -> int:
        return self.slots - len(self._tasks)

    def _batch_room(self) -> int:
        return self._room() - self.slots // 10 if self._lanes[0].is_idle() else 0

    def _take(self, msg: QueueMessage, asked_at: float) -> None:
        task = self._tasks.start(self._handle(msg, self.leases.begin(asked_at)), name="request")
        task.add_done_callback(self._handled)
        self._lanes[0].wake()

    def _handled(self, _task: asyncio.Task[None]) -> None:
        metrics.ACTIVE.set(len(self.running))
        for lane in self._lanes:
            lane.wake()

    async def _handle(self, msg: QueueMessage, lease: Lease) -> None:
        """Decode a request, hold it, run it once there is a slot, and answer the queue."""
        if lease.is_over():  # delivered late, or this process was frozen: it may run elsewhere already
            metrics.LEASES_LOST.inc()
            log.warning("request received after its lease", subject=msg.subject)
            return
        if self._is_leaving:
            await self._publish(msg.reply, AT_ONCE)
            return
        # Decode it; a request that cannot be decoded is dead.
        delivery = delivered(msg.reply.encode()).deliveries
        metrics.TAKEN.inc()
        try:
            request = msgspec.json.decode(msg.data, type=Request)
            relay = Relay(request, delivery, lease, self.context)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            log.error("request not decoded", subject=msg.subject, detail=str(error))
            is_buried = await self._dead.reject(msg, delivery, lease, str(error))
            await self._publish(msg.reply, TERM if is_buried else _LATER)
            return
        # Hold it, so that its lease is renewed while it waits for a slot.
        held = self.leases.hold(relay.address, msg.reply, lease)
        if held is None:
            log.info("redelivery of a held request ignored", generation=request.generation)
            return
        waited = max(0.0, self.context.clock.wall() - request.created_at)
        metrics.QUEUE_WAIT.observe(waited)
        metrics.TAKEN_STAGE.observe(waited)
        answer = None
        try:
            async with self._slot:
                if lease.is_over():
                    return  # it waited too long; beginning now would take it from its owner
                self.running[msg.reply] = relay
                metrics.ACTIVE.set(len(self.running))
                answer = await self._run(relay, delivery, msg, held)
        except asyncio.CancelledError:
            answer = AT_ONCE
            raise
        finally:
            if self.running.get(msg.reply) is relay:
                del self.running[msg.reply]
            await self.leases.release(held)
            # After the lease, send no answer: the queue would attribute it to the producer that runs the request now.
            if answer is not None and not lease.is_over():
                await self._publish(msg.reply, answer)

    async def _run(self, relay: Relay, delivery: int, msg: QueueMessage, held: HeldRequest) -> bytes | None:
        """Run a request; return the answer to the queue, or ``None`` for none."""
        request = relay.request
        bound = log.bind(session=request.session, generation=request.generation)
        listening = before = claim = None
        try:
            # Leave a redelivered request to its producer if that one still runs it.
            before = await self._claims.last(relay.address, delivery)
            if delivery > 1 and await self.leases.is_held_elsewhere(relay.address, before):
                metrics.LEFT_TO_HOLDERS.inc()
                bound.info("redelivered request left to the producer that runs it")
                return None
            # Listen for cancels from here on, also while the generation is closed as poison.
            listening = await self._cancels.listen(request, relay.interruption, lambda: relay.ended)
            if before.begun >= self.max_deliver:
                await relay.fail_unrun(f"{self.max_deliver} producers failed to run it")
                await self._claims.seal(relay.address, before)
                is_buried = await self._dead.bury(msg, "max_deliver")
                await self._publish(msg.reply, TERM if is_buried else _LATER)
                return None
            # Claim the request and run it to its terminal; the last claimant seals it and answers the queue.
            await self._losses.learn(relay.address.partition)
            claim = await self._claims.claim(relay.address, delivery, before)
            await self.leases.begun(held, claim)
            if await relay.run():
                await self._claims.seal(relay.address, claim)
        except HandBack:
            await self._withdraw(relay, before, claim)
            return AT_ONCE
        except GiveUp as error:
            metrics.LEASES_LOST.inc()
            bound.warning("generation given up", detail=str(error))
            return None
        except (TryAgain, BrokerUnavailable) as error:
            bound.warning("request handed back", detail=str(error))
            await self._withdraw(relay, before, claim)
            return _LATER
        except Exception as error:  # our own bug: another producer may succeed, up to max_deliver
            bound.error("request failed", exc_info=error)
            return _LATER
        else:
            self._cancels.linger(listening)
            return ACK
        finally:
            if listening is not None:
                await self._cancels.stop(listening)

    async def _withdraw(self, relay: Relay, before: Claim | None, claim: Claim | None) -> None:
        """Do not count an attempt that a shutdown or an outage of the log ended, unless that goes on for hours."""
        age = self.context.clock.wall() - relay.request.created_at
        if before is not None and claim is not None and age < EXCUSED_SECONDS:
            await self._claims.withdraw(relay.address, before, claim)

    async def _watch(self) -> None:
        """Check the deadlines and leases of all running generations, every `WATCH_INTERVAL` seconds."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            now = self.context.clock.monotonic()
            for relay in list(self.running.values()):
                relay.check(now)

    async def _publish(self, subject: str, data: bytes) -> None:
        try:
            await self._broker.publish(subject, data)
        except BrokerUnavailable as error:
            log.warning("answer to the queue not sent", subject=subject, detail=str(error))
