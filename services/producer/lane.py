"""One lane of the work queue: pull requests as there is room for them."""

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple

import structlog

from schemas.topology import REQUESTS, producers_durable
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.pull import End, PullConsumer
from services.kit.tasks import BackgroundTasks, wait_for_event

__all__ = ["Lane", "QueueMessage"]

log = structlog.get_logger()
PULL_EXPIRES: Final = 5.0
SHORTEST_PULL: Final = 0.5
POLL_INTERVAL: Final = 0.25
LEAVE_SECONDS: Final = 0.5
"""Seconds within which the broker should confirm that a pull delivers nothing more."""


class QueueMessage(NamedTuple):
    """A request as the queue delivers it; ``reply``: its acknowledgement subject."""

    subject: str
    reply: str
    data: bytes


class Lane:
    """Pull the requests of one pool and priority.

    ``room`` returns how many requests may be taken now. ``take`` receives each request with the time of its pull, the
    earliest time at which the queue can have delivered it. A ``patient`` lane keeps a pull open for future requests, at
    most for a quarter of the ``lease``; any other lane polls, so that it never reserves room that it does not need.
    """

    def __init__(
        self,
        broker: Broker,
        lane: str,
        room: Callable[[], int],
        take: Callable[[QueueMessage, float], None],
        *,
        lease: float,
        patient: bool,
    ) -> None:
        self._broker = broker
        self._durable = producers_durable(lane)
        self._room = room
        self._take = take
        self._patient = patient
        self._asked_at = 0.0
        self._expires = min(PULL_EXPIRES, max(SHORTEST_PULL, lease / 4))
        self._pulling: PullConsumer | None = None
        self._leaving = BackgroundTasks()  # pulls that are ended; each for LEAVE_SECONDS at most
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Pull again: there may be more room now."""
        self._wake.set()

    def is_idle(self) -> bool:
        """Return whether the lane is empty: an open pull would have delivered another request at once."""
        is_open = self._pulling is not None and self._pulling.is_open()
        return is_open and asyncio.get_running_loop().time() - self._asked_at >= POLL_INTERVAL

    async def run(self) -> None:
        """Pull until cancelled; then still take the requests that are under way."""
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
        pulling, self._pulling = self._pulling, None
        if pulling is not None:
            self._leaving.start(pulling.close(LEAVE_SECONDS), name="lane-leave")

    async def _ask(self) -> None:
        room, now = self._room(), asyncio.get_running_loop().time()
        if room <= 0 or not self._broker.is_connected or not (self._pulling is None or self._pulling.may_pull()):
            return
        self._forget()
        # A new consumer object for each pull distinguishes its requests from those of an earlier pull.
        pulling = PullConsumer(self._broker, REQUESTS, self._durable, lambda: self._receive(pulling, now))
        self._pulling, self._asked_at = pulling, now
        try:
            await pulling.pull(room, wait=self._expires if self._patient else 0.0)
        except BrokerUnavailable as error:
            log.warning("requests not pulled", detail=str(error))

    def _receive(self, pulling: PullConsumer, asked_at: float) -> None:
        while pulling.arrived:
            subject, reply, data = pulling.arrived.popleft()
            self._take(QueueMessage(subject.decode(), reply.decode(), data), asked_at)
        if pulling is not self._pulling or pulling.end is None:
            return
        if pulling.end in (End.GONE, End.REFUSED):
            log.warning("pull ended", reason=pulling.reason)
        elif self._patient:
            self._wake.set()
