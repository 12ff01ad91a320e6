"""One lane of the work queue: pulls requests as there is room for them."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import msgspec
import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from schemas.topology import REQUESTS, producers_durable
from services.kit.jetstream.broker import Broker, BrokerUnavailable

__all__ = ["Lane"]

log = structlog.get_logger()
PULL_EXPIRES: Final = 5.0
SHORTEST_PULL: Final = 0.5
LOOK_INTERVAL: Final = 0.25
LEAVE_SECONDS: Final = 0.5
"""How long the broker may take to confirm that nothing more comes of a pull."""
_QUIET: Final = ("404", "408")


class Lane:
    """Asks the queue for requests of one pool and priority.

    ``room`` tells how many may be taken now; ``take`` gets each request, and when it was asked for: the queue cannot
    have given it earlier, however late it arrives. A patient lane leaves a pull waiting for what comes, but no longer
    than a quarter of the ``lease``; another one only looks now and then, so that it never holds room that it does not
    need.
    """

    def __init__(
        self,
        broker: Broker,
        lane: str,
        room: Callable[[], int],
        take: Callable[[Msg, float], None],
        *,
        lease: float,
        patient: bool,
    ) -> None:
        self._broker = broker
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{REQUESTS}.{producers_durable(lane)}"
        self._room = room
        self._take = take
        self._patient = patient
        self._asked = 0  # requests that the present pull may still bring
        self._asked_at = 0.0
        self._has_ended = True  # whether the broker has said that nothing more comes of the present pull
        self._expires = min(PULL_EXPIRES, max(SHORTEST_PULL, lease / 4))
        self._subscription: Subscription | None = None
        self._leaving: set[asyncio.Task[None]] = set()  # pulls that are ended; each for LEAVE_SECONDS at most
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There may be more room now."""
        self._wake.set()

    def is_idle(self) -> bool:
        """Whether its requests are all taken: a pull that still waits after a moment has found nothing more."""
        return self._asked > 0 and asyncio.get_running_loop().time() - self._asked_at >= LOOK_INTERVAL

    async def run(self) -> None:
        """Pull until cancelled; what is on its way then is taken still."""
        try:
            while True:
                await self._ask()
                self._wake.clear()
                await _at_most(self._wake.wait(), 1.0 if self._patient else LOOK_INTERVAL)
        finally:
            self._forget()
            if self._leaving:
                await asyncio.wait(self._leaving, timeout=2 * LEAVE_SECONDS)

    def _forget(self) -> None:
        """End the pull, beside everything else.

        The queue may have answered it just now. What came to nobody would be given again only after the lease.
        """
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            task = asyncio.create_task(self._leave(subscription, has_ended=self._has_ended))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _leave(self, subscription: Subscription, *, has_ended: bool) -> None:
        if has_ended:
            with suppress(nats.errors.Error):  # the connection is closed, and with it the subscription
                await subscription.unsubscribe()
        else:
            await self._broker.leave(subscription, LEAVE_SECONDS)

    async def _ask(self) -> None:
        room, now = self._room(), asyncio.get_running_loop().time()
        if (
            room <= 0
            or not self._broker.is_connected
            or (self._asked > 0 and now < self._asked_at + self._expires + 1.0)
        ):
            return
        self._forget()
        query: dict[str, object] = {"batch": room}
        query |= {"expires": round(self._expires * 1e9)} if self._patient else {"no_wait": True}
        self._asked, self._asked_at, self._has_ended = room, now, False

        async def receive(msg: Msg) -> None:
            await self._receive(msg, now)

        # An inbox of its own tells which pull a request answers.
        inbox = self._broker.client.new_inbox()
        self._subscription = await self._broker.subscribe(inbox, receive)
        try:
            await self._broker.publish(self._subject, msgspec.json.encode(query), reply=inbox)
        except BrokerUnavailable as error:
            log.warning("cannot ask for requests", detail=str(error))

    async def _receive(self, msg: Msg, asked_at: float) -> None:
        if msg.reply:
            if asked_at == self._asked_at:
                self._asked -= 1
                self._has_ended = self._asked <= 0
            self._take(msg, asked_at)
            return
        if asked_at != self._asked_at:
            return
        self._asked, self._has_ended = 0, True  # a status: the pull has ended, or cannot be served now
        status = (msg.headers or {}).get("Status")
        if status not in _QUIET:
            log.warning("pull ended", status=status, detail=(msg.headers or {}).get("Description"))
            await asyncio.sleep(LOOK_INTERVAL)
        if self._patient:
            self._wake.set()


async def _at_most(what: Awaitable[object], seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await what
    except TimeoutError:
        return
