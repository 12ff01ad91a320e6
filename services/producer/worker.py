"""Takes requests from the work queue, a bounded number at a time, and keeps their leases."""

import asyncio
from typing import Final

import msgspec
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.errors import APIError

from schemas.control import CANCEL, HEARD, OVER, OVER_BUDGET
from schemas.requests import Request
from schemas.subjects import control_subject, dead_subject, lane_of
from schemas.topology import Topology
from services.kit.broker import BrokerUnavailable
from services.kit.shutdown import HAND_OVER, Stop, end
from services.producer import metrics
from services.producer.adapters.claims import Claim, Claims
from services.producer.adapters.publisher import Lease
from services.producer.errors import GiveUp, ProducerError, TryAgain
from services.producer.lane import LEAVE_SECONDS, Lane
from services.producer.leases import HeldRequest, Leases
from services.producer.log_losses import LogLosses
from services.producer.log_repair import LogRepair
from services.producer.lost_requests import LostRequests
from services.producer.presence import Presence
from services.producer.queue_repair import QueueRepair
from services.producer.relay import HandBack, Interruption, Relay, RelayContext

__all__ = ["Worker"]

log = structlog.get_logger()
WATCH_INTERVAL: Final = 0.1
LINGER_SECONDS: Final = 1.0
EXCUSED_SECONDS: Final = 6 * 3_600.0
"""Age of a request up to which outages of the log do not count as attempts at it."""

_LATER: Final = b'-NAK {"delay": 2000000000}'
_AT_ONCE: Final = b'-NAK {"delay": 1}'
"""With a delay, however short, the queue writes down that the lease is over: that survives a restart of the broker."""


class _Place(msgspec.Struct):
    """Where a request belongs, read from one that is otherwise unreadable."""

    tenant: str
    session: str
    generation: str
    partition: int | None = None


class Worker:
    """Runs up to ``slots`` generations at once; of these, batch leaves a tenth free for who waits interactively.

    The queue's redelivery is the lease: ``lease`` seconds after the last heartbeat another producer gets the request.
    It is counted from when the request was asked for, which is never later than when the queue gave it. A request that
    producers have begun ``max_deliver`` times and that failed them each time ends as poison.
    """

    def __init__(self, context: RelayContext, pool: str, slots: int, lease: float, max_deliver: int) -> None:
        self.context = context
        self.pool = pool
        self.slots = slots
        self._ack_wait = lease
        self.max_deliver = max_deliver
        self.running: dict[str, Relay] = {}  # by acknowledgement subject; bounded by slots
        self._broker = context.broker
        self._tries = Claims(context.broker)
        self.leases = Leases(context.broker, context.publisher, self._tries, lease)
        self._is_leaving = False
        self._lingering: dict[Subscription, asyncio.Task[None]] = {}  # for LINGER_SECONDS after an end
        self._slot = asyncio.Semaphore(slots)
        self._tasks: set[asyncio.Task[None]] = set()
        self._lanes = [
            Lane(self._broker, lane_of(pool, "interactive"), self._room, self._take, lease=lease, patient=True),
            Lane(self._broker, lane_of(pool, "batch"), self._batch_room, self._take, lease=lease, patient=False),
        ]
        self._losses = LogLosses(self._broker, lambda: list(self.running.values()))
        self._presence = Presence(self._broker, context.clock, lambda: list(self.running.values()))
        metrics.SLOTS.set(slots)

    async def run(self, stop: Stop) -> None:
        """Work until ``stop``; then take nothing new, give what runs its drain time, and hand the rest over."""
        try:
            async with asyncio.TaskGroup() as group:
                lanes = [group.create_task(lane.run(), name="lane") for lane in self._lanes]
                care = QueueRepair(self._broker, Topology(pool=self.pool, ack_wait=self._ack_wait).producers())
                orphans = LostRequests(self.context, self.leases.holds, self._ack_wait)
                repair = LogRepair(self.context, self._losses.logs, orphans)
                watches = [group.create_task(w) for w in (self.leases.keep(), self._watch(), self._presence.watch())]
                watches += [group.create_task(w) for w in (care.run(), self._losses.run(), orphans.run(), repair.run())]
                await stop.wait()
                self._is_leaving = True
                await end(*lanes, seconds=2 * LEAVE_SECONDS)
                await self._drain(stop)
                await end(*watches)
        finally:
            # An append whose outcome must be known may wait for a log without a leader: that is cut here.
            await end(*self._tasks, *self._lingering.values())

    async def _drain(self, stop: Stop) -> None:
        await self._give_back_what_waits()
        if self._tasks:
            log.warning("answers still run and have time to end", count=len(self._tasks), seconds=round(stop.left(), 1))
            await asyncio.wait(self._tasks, timeout=stop.left())
        if self.running:
            log.warning("answers are cut and handed over", count=len(self.running))
        for relay in list(self.running.values()):
            relay.interrupt(Interruption("drain", "drain"))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=stop.left(HAND_OVER))

    async def _give_back_what_waits(self) -> None:
        """Hand over at once what has no slot yet."""
        for held in self.leases.everything():
            if held.reply not in self.running and not held.lease.is_over():
                held.lease.is_lost = True
                await self._publish(held.reply, _AT_ONCE)

    def _room(self) -> int:
        return self.slots - len(self._tasks)

    def _batch_room(self) -> int:
        return self._room() - self.slots // 10 if self._lanes[0].is_idle() else 0

    def _take(self, msg: Msg, asked_at: float) -> None:
        task = asyncio.create_task(self._handle(msg, self.leases.begin(asked_at)))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        self._lanes[0].wake()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        metrics.ACTIVE.set(len(self.running))
        for lane in self._lanes:
            lane.wake()
        if not task.cancelled() and task.exception() is not None:
            log.error("request handler failed", exc_info=task.exception())

    async def _handle(self, msg: Msg, lease: Lease) -> None:
        if lease.is_over():  # it was long on its way, or this process was frozen: it may run elsewhere already
            metrics.LEASES_LOST.inc()
            log.warning("request came too late", subject=msg.subject)
            return
        if self._is_leaving:
            await self._publish(msg.reply, _AT_ONCE)
            return
        attempt = _attempt(msg.reply)
        metrics.TAKEN.inc()
        try:
            request = msgspec.json.decode(msg.data, type=Request)
            relay = Relay(request, attempt, lease, self.context)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            log.error("request is not readable", subject=msg.subject, detail=str(error))
            await self._reject(msg, attempt, lease, str(error))
            return
        held = self.leases.hold(relay.address, msg.reply, lease)
        if held is None:
            log.info("request came again while it is held here", generation=request.generation)
            return
        metrics.QUEUE_WAIT.observe(max(0.0, self.context.clock.wall() - request.created_at))
        answer = None
        try:
            async with self._slot:
                if lease.is_over():
                    return  # it waited too long; to begin it now would take it from its owner
                self.running[msg.reply] = relay
                metrics.ACTIVE.set(len(self.running))
                answer = await self._run(relay, attempt, msg, held)
        except asyncio.CancelledError:
            answer = _AT_ONCE
            raise
        finally:
            if self.running.get(msg.reply) is relay:
                del self.running[msg.reply]
            await self.leases.release(held)
            # Whose lease has run out has no say any more: any answer would count for the producer that runs it now.
            if answer is not None and not lease.is_over():
                await self._publish(msg.reply, answer)

    async def _run(self, relay: Relay, attempt: int, msg: Msg, held: HeldRequest) -> bytes | None:
        request = relay.request
        bound = log.bind(session=request.session, generation=request.generation)
        subscription: Subscription | None = None
        before = now = None
        try:
            before = await self._tries.before(relay.address, attempt)
            if attempt > 1 and await self.leases.is_held_elsewhere(relay.address, before):
                metrics.LEFT_TO_HOLDERS.inc()
                bound.info("request came again and is left to the producer that runs it")
                return None
            subscription = await self._listen(relay)
            if before.begun >= self.max_deliver:
                await relay.give_up(f"{self.max_deliver} producers failed to run it")
                await self._tries.finish(relay.address, before)
                await self._bury(msg, "max_deliver")
                return None
            await self._losses.learn(relay.address.partition)
            now = await self._tries.begin(relay.address, attempt, before)
            await self.leases.begun(held, now)
            if await relay.run():
                await self._tries.finish(relay.address, now)
        except HandBack:
            await self._excuse(relay, before, now)
            return _AT_ONCE
        except GiveUp as error:
            metrics.LEASES_LOST.inc()
            bound.warning("generation given up", detail=str(error))
            return None
        except (TryAgain, BrokerUnavailable) as error:
            bound.warning("request handed back", detail=str(error))
            await self._excuse(relay, before, now)
            return _LATER
        except Exception as error:  # a fault of ours: others may have more luck, up to max_deliver
            bound.error("request failed", exc_info=error)
            return _LATER
        else:
            self._linger(subscription)
            return b"+ACK"
        finally:
            if subscription is not None and subscription not in self._lingering and not self._broker.client.is_closed:
                await subscription.unsubscribe()

    def _linger(self, subscription: Subscription) -> None:
        """Answer for a moment more: whoever has just asked must not wait for an answer that nobody gives."""

        async def leave() -> None:
            try:
                await asyncio.sleep(LINGER_SECONDS)
                await self._broker.leave(subscription, LEAVE_SECONDS)
            finally:
                del self._lingering[subscription]

        self._lingering[subscription] = asyncio.create_task(leave())

    async def _excuse(self, relay: Relay, before: Claim | None, now: Claim | None) -> None:
        """Let an attempt not count in which this process went away or the log was, unless that never ends."""
        age = self.context.clock.wall() - relay.request.created_at
        if before is not None and now is not None and age < EXCUSED_SECONDS:
            await self._tries.excuse(relay.address, before, now)

    async def _listen(self, relay: Relay) -> Subscription:
        request = relay.request

        async def control(msg: Msg) -> None:
            if relay.ended:
                await self._publish(msg.reply, OVER)
                return
            if msg.data == CANCEL:
                relay.interrupt(Interruption("cancelled", "requested"))
            elif msg.data == OVER_BUDGET:
                relay.interrupt(Interruption("over_budget", "budget_exceeded"))
            await self._publish(msg.reply, HEARD)

        subject = control_subject(request.tenant, request.session, request.generation)
        return await self._broker.subscribe(subject, control)

    async def _reject(self, msg: Msg, attempt: int, lease: Lease, reason: str) -> None:
        """End a request that cannot be read; whoever waits for its generation hears of it where its place is known."""
        try:
            place = msgspec.json.decode(msg.data, type=_Place)
            request = Request(
                tenant=place.tenant,
                session=place.session,
                generation=place.generation,
                partition=place.partition,
                model="",
                messages=[],
            )
            await Relay(request, attempt, lease, self.context).give_up(f"the request is not readable: {reason}")
        except (msgspec.DecodeError, ValueError, RecursionError):
            log.warning("an unreadable request does not say where it belongs", subject=msg.subject)
        except (ProducerError, BrokerUnavailable) as error:
            log.warning("request handed back", subject=msg.subject, detail=str(error))
            await self._publish(msg.reply, _LATER)
            return
        await self._bury(msg, reason)

    async def _bury(self, msg: Msg, reason: str) -> None:
        """Move a request that cannot run to where it can be inspected."""
        subject = dead_subject(self.pool, msg.subject.rsplit(".", 1)[-1])
        try:
            headers = {"Tailrace-Reason": reason[:200], "Nats-Msg-Id": msg.subject}
            await self._broker.publish_stored(subject, msg.data, headers=headers)
        except (BrokerUnavailable, APIError) as error:
            log.warning("dead request not kept", detail=str(error))
            await self._publish(msg.reply, _LATER)
            return
        await self._publish(msg.reply, b"+TERM")

    async def _watch(self) -> None:
        """Look at deadlines and leases; one look serves all generations."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            now = self.context.clock.monotonic()
            for relay in list(self.running.values()):
                relay.check(now)

    async def _publish(self, subject: str, data: bytes, reply: str = "") -> None:
        try:
            await self._broker.publish(subject, data, reply=reply)
        except BrokerUnavailable as error:
            log.warning("cannot publish", subject=subject, detail=str(error))


def _attempt(reply: str) -> int:
    """Return the delivery count that a JetStream acknowledgement subject states (both its forms)."""
    parts = reply.split(".")
    return int(parts[6] if len(parts) >= 12 else parts[4])
