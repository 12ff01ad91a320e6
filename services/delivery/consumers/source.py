"""One of the broker's consumers as a session reads it: pulled on demand, never more than was asked for."""

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from services.kit.jetstream.ack import delivered
from services.kit.jetstream.broker import Broker
from services.kit.jetstream.pull import Arrived, End, PullConsumer

__all__ = ["WAIT_SECONDS", "Raw", "Source"]

WAIT_SECONDS: Final = 10.0
"""How long a pull waits at the broker for something to come, before it is asked again."""
LEAVE_SECONDS: Final = 2.0
"""How long the broker may take to confirm that nothing more comes of a pull."""


class Raw(NamedTuple):
    """One delivery as the broker made it. ``reply``: where to say what became of it."""

    seq: int
    consumer_seq: int
    deliveries: int
    subject: str
    data: bytes
    reply: str


class Source:
    """The broker's consumer of one partition. ``changed`` is called after each delivery and each end of a pull."""

    def __init__(self, broker: Broker, partition: int, stream: str, durable: str, changed: Callable[[], None]) -> None:
        self.partition = partition
        self.stream = stream
        self.durable = durable
        self.incarnation = ""
        self.cut: int | None = None  # the last stream sequence before a loss that its reader has not heard of
        self.since = 0  # all of the filter's messages above this stream sequence came here, up to the newest one
        self._last = 0  # number of the newest delivery
        self._consumer = PullConsumer(broker, stream, durable, changed)

    @property
    def buffer(self) -> deque[Arrived]:
        """What has come and was not taken yet."""
        return self._consumer.arrived

    @property
    def is_empty(self) -> bool:
        """Whether the broker had no more when it was asked last."""
        return self._consumer.end in (End.EMPTY, End.GONE, End.REFUSED)

    @property
    def is_gone(self) -> bool:
        """Whether consumer or stream did not exist any more when the broker was asked last."""
        return self._consumer.end is End.GONE

    def answering(self) -> int:
        """Return how many events may still come of a pull for what is there; 0 where the broker has said all."""
        return self._consumer.answering()

    def may_be_asked(self) -> bool:
        """Tell whether no pull is open, and asking makes sense."""
        return not self.is_gone and self._consumer.may_pull()

    async def open(self) -> None:
        """Listen for deliveries.

        Raises:
            BrokerUnavailable: the connection is closed.
        """
        await self._consumer.open()

    async def ask(self, count: int, max_bytes: int, wait: float = 0.0) -> None:
        """Ask for up to ``count`` events: for those that are there, or with ``wait`` for those that come within it.

        Raises:
            BrokerUnavailable: it cannot be sent.
        """
        await self._consumer.pull(count, max_bytes=max_bytes, wait=wait)

    def forget(self) -> None:
        """Take the open pull for lost, and ask anew."""
        self._consumer.forget()

    async def close(self) -> None:
        """Stop listening; what the broker had sent is in the buffer then."""
        await self._consumer.close(LEAVE_SECONDS)

    def next(self) -> Raw:
        """Return the first delivery in the buffer, which stays there."""
        subject, reply, data = self.buffer[0]
        numbers = delivered(reply)
        return Raw(numbers.seq, numbers.consumer_seq, numbers.deliveries, subject.decode(), data, reply.decode())

    def gap_before(self, seq: int) -> str | None:
        """Return why events are missing before the one with this stream sequence; told once."""
        if self.cut is None or seq <= self.cut:
            return None
        self.cut = None
        return "log_recreated"

    def seen(self, raw: Raw) -> int:
        """Note a delivery as the newest one; return above which stream sequence all came here, up to this event.

        The broker numbers the deliveries of all readers together: a missing number is one that another one got.
        """
        if raw.deliveries == 1:
            if raw.consumer_seq != self._last + 1 or self._last == 0:
                self.since = raw.seq - 1
            self._last = raw.consumer_seq
        elif raw.consumer_seq == self._last + 1 and self._last > 0:
            self._last = raw.consumer_seq  # given again in between: the new ones still come without a hole
        else:
            self._last = 0  # others may have got new ones before it
        return self.since if raw.deliveries == 1 else raw.seq - 1
