"""One lane of the work queue: pulls requests as there is room for them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import structlog

from schemas.topology import REQUESTS, producers_durable
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.pull import End, PullConsumer

__all__ = ["Lane", "QueueMessage"]

log = structlog.get_logger()
PULL_EXPIRES: Final = 5.0
SHORTEST_PULL: Final = 0.5
LOOK_INTERVAL: Final = 0.25
LEAVE_SECONDS: Final = 0.5
"""How long the broker may take to confirm that nothing more comes of a pull."""


class QueueMessage(NamedTuple):
    """A request as the queue delivers it; ``reply``: its acknowledgement subject."""

    subject: str
    reply: str
    data: bytes


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
        self._leaving: set[asyncio.Task[None]] = set()  # pulls that are ended; each for LEAVE_SECONDS at most
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There may be more room now."""
        self._wake.set()

    def is_idle(self) -> bool:
        """Whether its requests are all taken: a pull that still waits after a moment has found nothing more."""
        is_open = self._pulling is not None and self._pulling.is_open()
        return is_open and asyncio.get_running_loop().time() - self._asked_at >= LOOK_INTERVAL

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
        pulling, self._pulling = self._pulling, None
        if pulling is not None:
            task = asyncio.create_task(pulling.close(LEAVE_SECONDS))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _ask(self) -> None:
        room, now = self._room(), asyncio.get_running_loop().time()
        if room <= 0 or not self._broker.is_connected or not (self._pulling is None or self._pulling.may_pull()):
            return
        self._forget()
        # A consumer of its own for each pull: its inbox tells which pull, and so which time, a request answers.
        pulling = PullConsumer(self._broker, REQUESTS, self._durable, lambda: self._receive(pulling, now))
        self._pulling, self._asked_at = pulling, now
        try:
            await pulling.pull(room, wait=self._expires if self._patient else 0.0)
        except BrokerUnavailable as error:
            log.warning("cannot ask for requests", detail=str(error))

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


async def _at_most(what: Awaitable[object], seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await what
    except TimeoutError:
        return
