"""Read one of the broker's consumers on demand: never more events than requested."""

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from services.kit.jetstream.ack import delivered
from services.kit.jetstream.broker import Broker
from services.kit.jetstream.pull import Arrived, End, PullConsumer

__all__ = ["WAIT_SECONDS", "Raw", "Source"]

WAIT_SECONDS: Final = 10.0
"""Longest time in seconds that a pull waits at the broker for an event."""
LEAVE_SECONDS: Final = 2.0
"""Longest wait in seconds for the broker's confirmation that a pull has ended."""


class Raw(NamedTuple):
    """One delivery of the broker. ``reply``: subject for its acknowledgement."""

    seq: int
    consumer_seq: int
    deliveries: int
    subject: str
    data: bytes
    reply: str


class Source:
    """Read the broker's consumer of one partition. ``changed`` is called after each delivery and each end of a pull."""

    def __init__(self, broker: Broker, partition: int, stream: str, durable: str, changed: Callable[[], None]) -> None:
        self.partition = partition
        self.stream = stream
        self.durable = durable
        self.incarnation = ""
        self.cut: int | None = None  # last stream sequence before a loss not yet reported to the reader
        self.since = 0  # all messages of the filter above this stream sequence arrived here, up to the newest
        self._last = 0  # number of the newest delivery
        self._consumer = PullConsumer(broker, stream, durable, changed)

    @property
    def buffer(self) -> deque[Arrived]:
        """Deliveries that have arrived and were not processed yet."""
        return self._consumer.arrived

    @property
    def is_empty(self) -> bool:
        """Whether the last pull ended because the broker had no more events."""
        return self._consumer.end in (End.EMPTY, End.GONE, End.REFUSED)

    @property
    def is_gone(self) -> bool:
        """Whether the last pull ended because the consumer or its stream no longer exists."""
        return self._consumer.end is End.GONE

    def answering(self) -> int:
        """Return how many available events the open pull can still deliver; 0 when it has ended."""
        return self._consumer.answering()

    def may_be_asked(self) -> bool:
        """Return whether a new pull can be made: none is open and the consumer exists."""
        return not self.is_gone and self._consumer.may_pull()

    async def open(self) -> None:
        """Subscribe to deliveries.

        Raises:
            BrokerUnavailable: the connection is closed.
        """
        await self._consumer.open()

    async def ask(self, count: int, max_bytes: int, wait: float = 0.0) -> None:
        """Pull up to ``count`` events: the available ones, or with ``wait`` those that arrive within ``wait`` seconds.

        Raises:
            BrokerUnavailable: the pull cannot be sent.
        """
        await self._consumer.pull(count, max_bytes=max_bytes, wait=wait)

    def forget(self) -> None:
        """Treat the open pull as lost, so that a new one can be made."""
        self._consumer.forget()

    async def close(self) -> None:
        """Unsubscribe; all deliveries sent until then are in the buffer afterwards."""
        await self._consumer.close(LEAVE_SECONDS)

    def next(self) -> Raw:
        """Return the first delivery in the buffer without removing it."""
        subject, reply, data = self.buffer[0]
        numbers = delivered(reply)
        return Raw(numbers.seq, numbers.consumer_seq, numbers.deliveries, subject.decode(), data, reply.decode())

    def gap_before(self, seq: int) -> str | None:
        """Return the reason why events before stream sequence ``seq`` are missing, once; otherwise None."""
        if self.cut is None or seq <= self.cut:
            return None
        self.cut = None
        return "log_recreated"

    def seen(self, raw: Raw) -> int:
        """Record a delivery as the newest; return the stream sequence above which all events up to it arrived here.

        The broker numbers the deliveries of all readers together: another reader received a missing number.
        """
        if raw.deliveries == 1:
            if raw.consumer_seq != self._last + 1 or self._last == 0:
                self.since = raw.seq - 1
            self._last = raw.consumer_seq
        elif raw.consumer_seq == self._last + 1 and self._last > 0:
            self._last = raw.consumer_seq  # a redelivery in between: new deliveries are still contiguous
        else:
            self._last = 0  # other readers may have received new deliveries before it
        return self.since if raw.deliveries == 1 else raw.seq - 1
