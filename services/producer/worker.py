"""Takes requests from the work queue, a bounded number at a time, and keeps their leases."""

import asyncio
from typing import Final

import msgspec
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from schemas.requests import Request
from schemas.subjects import control_subject, dead_subject
from schemas.topology import REQUESTS, producers_durable
from services.kit.broker import BrokerUnavailable
from services.producer import metrics
from services.producer.adapters.publisher import Lease
from services.producer.errors import GiveUp, TryAgain
from services.producer.relay import HandBack, Interruption, Outside, Relay

__all__ = ["Worker"]

log = structlog.get_logger()
PULL_EXPIRES: Final = 5.0
WATCH_INTERVAL: Final = 0.1
RENEW_SECONDS: Final = 2.0
RENEW_PAUSE: Final = 0.25


class Worker:
    """Runs up to ``slots`` generations at once.

    The queue's redelivery is the lease: ``lease`` seconds after the last heartbeat another producer gets the request.
    """

    def __init__(self, outside: Outside, pool: str, slots: int, lease: float, max_deliver: int) -> None:
        self.outside = outside
        self.pool = pool
        self.slots = slots
        self.lease = lease
        self.max_deliver = max_deliver
        self.running: dict[str, tuple[Relay, Lease]] = {}  # by acknowledgement subject; bounded by slots
        self._broker = outside.broker
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked = 0  # requests that the present pull may still bring
        self._asked_until = 0.0
        self._wake = asyncio.Event()
        self._taking = True
        metrics.SLOTS.set(slots)

    async def run(self, stop: asyncio.Event, drain: float) -> None:
        """Work until ``stop``; then take nothing new, give what runs ``drain`` seconds, and hand the rest over."""
        inbox = self._broker.client.new_inbox()
        subscription = await self._broker.subscribe(inbox, self._receive)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._pull(inbox)),
                    group.create_task(self._keep()),
                    group.create_task(self._watch()),
                ]
                await stop.wait()
                self._taking = False
                tasks[0].cancel()
                await self._unsubscribe(subscription)
                await self._drain(drain)
                for task in tasks[1:]:
                    task.cancel()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _drain(self, seconds: float) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for relay, _lease in list(self.running.values()):
            relay.interrupt(Interruption("drain", "drain"))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)

    async def _unsubscribe(self, subscription: Subscription) -> None:
        if not self._broker.client.is_closed:
            await subscription.unsubscribe()

    async def _pull(self, inbox: str) -> None:
        loop = asyncio.get_running_loop()
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{REQUESTS}.{producers_durable(self.pool)}"
        while True:
            free = self.slots - len(self._tasks)
            now = loop.time()
            if free > 0 and self._broker.is_connected and (self._asked <= 0 or now > self._asked_until):
                query = {"batch": free, "expires": int(PULL_EXPIRES * 1e9)}
                self._asked, self._asked_until = free, now + PULL_EXPIRES + 1.0
                await self._publish(subject, msgspec.json.encode(query), inbox)
            self._wake.clear()
            wait = max(0.05, self._asked_until - now) if self._broker.is_connected else 0.1
            try:
                async with asyncio.timeout(min(wait, 1.0)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _receive(self, msg: Msg) -> None:
        if not msg.reply:  # a status: the pull has ended or cannot be served now
            self._asked = 0
            status = (msg.headers or {}).get("Status")
            if status not in ("404", "408"):
                log.warning("pull ended", status=status, detail=(msg.headers or {}).get("Description"))
                await asyncio.sleep(0.1)
            self._wake.set()
            return
        self._asked -= 1
        if not self._taking or len(self._tasks) >= self.slots:
            await self._publish(msg.reply, b"-NAK")
            return
        task = asyncio.create_task(self._handle(msg))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        self._wake.set()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        metrics.ACTIVE.set(len(self._tasks))
        self._wake.set()
        if not task.cancelled() and task.exception() is not None:
            log.error("request handler failed", exc_info=task.exception())

    async def _handle(self, msg: Msg) -> None:
        attempt = _attempt(msg.reply)
        metrics.TAKEN.inc()
        metrics.ACTIVE.set(len(self._tasks))
        try:
            request = msgspec.json.decode(msg.data, type=Request)
            lease = Lease(asyncio.get_running_loop().time() + self.lease * 0.9)
            relay = Relay(request, attempt, lease, self.outside)
        except (msgspec.DecodeError, ValueError) as error:
            log.error("request is not readable", subject=msg.subject, detail=str(error))
            await self._bury(msg, str(error))
            return
        metrics.QUEUE_WAIT.observe(max(0.0, self.outside.clock.wall() - request.created_at))
        self.running[msg.reply] = (relay, lease)
        try:
            answer = await self._run(relay, attempt, msg)
        finally:
            del self.running[msg.reply]
        if answer is not None:
            await self._publish(msg.reply, answer)

    async def _run(self, relay: Relay, attempt: int, msg: Msg) -> bytes | None:
        request = relay.request
        bound = log.bind(session=request.session, generation=request.generation)
        subscription = await self._listen(relay)
        try:
            if attempt > self.max_deliver:
                await relay.give_up(f"{self.max_deliver} producers failed to run it")
                await self._bury(msg, "max_deliver")
                return None
            await relay.run()
        except HandBack:
            return b"-NAK"
        except GiveUp as error:
            metrics.LEASES_LOST.inc()
            bound.warning("generation given up", detail=str(error))
            return None
        except (TryAgain, BrokerUnavailable) as error:
            bound.warning("request handed back", detail=str(error))
            return b'-NAK {"delay": 2000000000}'
        except Exception as error:  # a fault of ours: others may have more luck, up to max_deliver
            bound.error("request failed", exc_info=error)
            return b'-NAK {"delay": 1000000000}'
        finally:
            if not self._broker.client.is_closed:
                await subscription.unsubscribe()
        return b"+ACK"

    async def _listen(self, relay: Relay) -> Subscription:
        request = relay.request

        async def control(msg: Msg) -> None:
            if msg.data == b"cancel":
                relay.interrupt(Interruption("cancelled", "requested"))
            await self._publish(msg.reply, b"ok")

        subject = control_subject(request.tenant, request.session, request.generation)
        return await self._broker.subscribe(subject, control)

    async def _bury(self, msg: Msg, reason: str) -> None:
        """Move a request that cannot run to where it can be inspected."""
        subject = dead_subject(self.pool, msg.subject.rsplit(".", 1)[-1])
        try:
            await self._broker.publish_stored(subject, msg.data, headers={"Tailrace-Reason": reason[:200]})
        except BrokerUnavailable as error:
            log.warning("dead request not kept", detail=str(error))
            return
        await self._publish(msg.reply, b"+TERM")

    async def _keep(self) -> None:
        """Renew the leases."""
        while True:
            await asyncio.sleep(self.lease / 3)
            await asyncio.gather(*(self._renew(reply, lease) for reply, (_, lease) in list(self.running.items())))

    async def _renew(self, reply: str, lease: Lease) -> None:
        """Ask until the queue has heard it: while it finds a new leader, nobody answers for up to 10 s."""
        loop = asyncio.get_running_loop()
        while reply in self.running:
            asked = loop.time()
            try:
                if await self._broker.request(reply, b"+WPI", timeout=RENEW_SECONDS) is not None:
                    lease.until = asked + self.lease * 0.9
                    return
            except BrokerUnavailable as error:
                log.warning("lease not renewed", detail=str(error))
            if loop.time() > lease.until:
                return
            await asyncio.sleep(RENEW_PAUSE)

    async def _watch(self) -> None:
        """Look at deadlines and leases; one look serves all generations."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            now = self.outside.clock.monotonic()
            for relay, _lease in list(self.running.values()):
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
