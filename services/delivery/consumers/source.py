"""One of the broker's consumers as a session reads it: pulled on demand, never more than was asked for."""

from collections import deque
from typing import Final, NamedTuple

import msgspec
from nats.aio.msg import Msg

from services.kit.jetstream.broker import Broker

__all__ = ["PATIENCE", "WAIT_SECONDS", "Raw", "Source", "stream_in"]

PATIENCE: Final = 1.5
"""Seconds that the end of a pull may be late before the pull is taken for lost."""
WAIT_SECONDS: Final = 10.0
"""How long a pull waits at the broker for something to come, before it is asked again."""
REST_SECONDS: Final = 1.0
"""How long not to ask after a refusal: too many wait at the broker already, or it has just lost its leader."""
_ENDED: Final = ("404", "408")
_FULL: Final = ("Batch Completed", "Message Size Exceeds MaxBytes")
_GONE: Final = ("Consumer Deleted", "Consumer is push based", "No Responders")


class Raw(NamedTuple):
    """One delivery as the broker made it. ``reply``: where to say what became of it."""

    seq: int
    consumer_seq: int
    deliveries: int
    subject: str
    data: bytes
    reply: str


def stream_in(reply: str) -> str:
    """Return the stream that an acknowledgement subject names."""
    parts = reply.split(".")
    return parts[2] if len(parts) == 9 else parts[4]


def _raw(msg: Msg) -> Raw:
    """``$JS.ACK.<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<time>.<pending>``.

    Servers with a domain put domain and account before the stream, and a token behind.
    """
    parts = msg.reply.split(".")
    at = 4 if len(parts) == 9 else 6
    return Raw(int(parts[at + 1]), int(parts[at + 2]), int(parts[at]), msg.subject, msg.data, msg.reply)


class Source:
    """The broker's consumer of one partition.

    At most one pull is open at a time. ``buffer`` holds what has come and was not taken yet: at most what one pull
    asked for, and as much again when a pull was taken for lost and was not.
    """

    def __init__(self, broker: Broker, partition: int, stream: str, durable: str, inbox: str) -> None:
        self.partition = partition
        self.stream = stream
        self.durable = durable
        self.incarnation = ""
        self.cut: int | None = None  # the last stream sequence before a loss that its reader has not heard of
        self.buffer: deque[Raw] = deque()
        self.is_empty = False  # the broker had no more when it was asked last
        self.is_gone = False  # consumer or stream do not exist any more
        self.since = 0  # all of the filter's messages above this stream sequence came here, up to the newest one
        self._last = 0  # number of the newest delivery
        self._broker = broker
        self._inbox = inbox
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}"
        self._pull = 0
        self._wanted = 0  # what the open pull may still bring; 0: none is open
        self._is_waiting = False
        self._lost_at = 0.0
        self._rests_until = 0.0

    def answering(self, now: float) -> int:
        """Return how many events may still come of a pull for what is there; 0 where the broker has said all."""
        return self._wanted if self.is_open(now) and not self._is_waiting else 0

    def may_be_asked(self, now: float) -> bool:
        """Tell whether no pull is open, and asking makes sense."""
        return not self.is_gone and now >= self._rests_until and not self.is_open(now)

    def is_open(self, now: float) -> bool:
        """Tell whether a pull is open that may still bring something."""
        return self._wanted > 0 and now < self._lost_at

    async def ask(self, count: int, max_bytes: int, now: float, wait: float = 0.0) -> None:
        """Ask for up to ``count`` events: for those that are there, or with ``wait`` for those that come within it.

        Raises:
            BrokerUnavailable: it cannot be sent.
        """
        self._pull += 1
        self._wanted = count
        self._is_waiting = wait > 0
        self._lost_at = now + wait + PATIENCE
        query = {"batch": count, "max_bytes": max_bytes}
        query |= {"expires": round(wait * 1e9)} if wait else {"no_wait": True}
        await self._broker.publish(self._next, msgspec.json.encode(query), reply=f"{self._inbox}.{self._pull}")

    def take(self, msg: Msg) -> None:
        """Take a delivered event."""
        self.buffer.append(_raw(msg))
        self._wanted = max(0, self._wanted - 1)
        self.is_empty = False

    def end(self, pull: int, status: str, description: str, now: float) -> None:
        """Take the end of a pull."""
        if pull != self._pull:
            return
        self._wanted = 0
        self.is_empty = description not in _FULL
        self.is_gone = status == "503" or description in _GONE
        if status not in _ENDED and description not in _FULL:
            self._rests_until = now + REST_SECONDS

    def forget(self) -> None:
        """Take the open pull for lost: the broker forgets pulls when a connection ends."""
        self._wanted = 0
        self.is_empty = False

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
