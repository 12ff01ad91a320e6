"""One lane of the work queue: pull requests as there is room for them."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec
import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from schemas.topology import REQUESTS, producers_durable
from services.kit.broker import Broker, BrokerUnavailable
from services.kit.tasks import BackgroundTasks, wait_for_event

__all__ = ["Lane"]

log = structlog.get_logger()
PULL_EXPIRES: Final = 5.0
SHORTEST_PULL: Final = 0.5
POLL_INTERVAL: Final = 0.25
LEAVE_SECONDS: Final = 0.5
"""Seconds within which the broker should confirm that a pull delivers nothing more."""
_QUIET: Final = ("404", "408")


class Lane:
    """Pull the requests of one pool and priority.

    ``room`` returns how many requests may be taken now. ``take`` gets each request with the time of its pull: the queue
    cannot have delivered it earlier, however late it arrives. A ``patient`` lane leaves a pull open for requests to
    come, at most for a quarter of the ``lease``; another one polls, so that it never holds room that it does not need.
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
        self._asked = 0  # requests that the present pull may still deliver
        self._asked_at = 0.0
        self._has_ended = True  # whether the broker has ended the present pull
        self._expires = min(PULL_EXPIRES, max(SHORTEST_PULL, lease / 4))
        self._subscription: Subscription | None = None
        self._leaving = BackgroundTasks()  # pulls that are ended; each for LEAVE_SECONDS at most
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Pull again: there may be more room now."""
        self._wake.set()

    def is_idle(self) -> bool:
        """Return whether all its requests are taken: an open pull would have delivered another one within a moment."""
        return self._asked > 0 and asyncio.get_running_loop().time() - self._asked_at >= POLL_INTERVAL

    async def run(self) -> None:
        """Pull until cancelled; requests that are on their way then are still taken."""
        try:
            while True:
                await self._ask()
                self._wake.clear()
                await wait_for_event(self._wake, 1.0 if self._patient else POLL_INTERVAL)
        finally:
            self._forget()
            await self._leaving.wait(2 * LEAVE_SECONDS)

    def _forget(self) -> None:
        """End the pull in the background.

        The queue may be answering it: a request that arrived after the subscription had gone would be delivered again
        only after its lease.
        """
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            self._leaving.start(self._leave(subscription, has_ended=self._has_ended), name="lane-leave")

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

        # With an inbox for each pull a request can be told from that of an earlier one.
        inbox = self._broker.client.new_inbox()
        self._subscription = await self._broker.subscribe(inbox, receive)
        try:
            await self._broker.publish(self._subject, msgspec.json.encode(query), reply=inbox)
        except BrokerUnavailable as error:
            log.warning("requests not pulled", detail=str(error))

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
            await asyncio.sleep(POLL_INTERVAL)
        if self._patient:
            self._wake.set()
