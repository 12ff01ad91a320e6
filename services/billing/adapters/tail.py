"""Read a partition's log: by pulls of its durable consumer, or directly where these leave holes."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Final

import msgspec
import structlog

from schemas.subjects import token_subject
from schemas.topology import ConsumerSpec, Topology
from services.billing.core.batch import Group
from services.billing.core.generation import Key
from services.billing.core.intake import Record, read_record
from services.kit.jetstream.ack import stored_at
from services.kit.jetstream.broker import Broker, BrokerUnavailable, Stored, StreamState
from services.kit.jetstream.consumer import Durables
from services.kit.jetstream.errors import APIError
from services.kit.jetstream.kept import highest_kept_epoch
from services.kit.jetstream.logs import Logs
from services.kit.jetstream.pull import Arrived, End, PullConsumer
from services.kit.stamps import nanoseconds

__all__ = ["LogState", "Pulled", "Tail"]

log = structlog.get_logger()
PULL_BYTES: Final = 16 * 1024 * 1024
"""Bound of one pull in bytes, and so of undecoded messages; raised where the broker allows larger messages."""
_DOUBTFUL: Final = (None, End.GONE, End.REFUSED)


class Pulled(msgspec.Struct):
    """The result of one pull: messages in delivery order with their replies, and the number still pending.

    ``doubtful``: the pull was lost or refused; the consumer or stream may be gone. ``full``: more messages wait.
    """

    arrived: deque[Arrived] = msgspec.field(default_factory=deque)
    pending: int | None = None
    doubtful: bool = False
    full: bool = False

    def records(self) -> list[Record]:
        """Return the messages decoded as records."""
        return [_pulled(subject, reply, data) for subject, reply, data in self.arrived]


class LogState(msgspec.Struct, frozen=True):
    """The state of a stream and its consumer: incarnation, bounds of the log, last sequence delivered to any process.

    ``base``, ``lost`` and ``reused``: see `schemas.log_marks.Mark`.
    """

    incarnation: str
    first_seq: int
    last_seq: int
    delivered_seq: int
    base: int = 0
    lost: int = 0
    reused: bool = False


class Tail:
    """The durable consumer of one partition. One pull at a time, bounded by ``batch`` events."""

    def __init__(self, broker: Broker, topology: Topology, partition: int, *, batch: int, interval: float) -> None:
        self.broker = broker
        self.topology = topology
        self.batch = batch
        self.interval = interval
        self.partition = partition
        self.spec: ConsumerSpec = topology.billing(partition)
        self.logs = Logs(broker)
        self._durables = Durables(broker)
        self._consumer = PullConsumer(broker, self.spec.stream, self.spec.durable)
        self._ack_all = False
        self._hurry = False  # the last pull was full: more messages wait
        self._is_doubtful = False  # reconnected since the last pull
        self._wake = asyncio.Event()

    async def open(self) -> None:
        """Subscribe to deliveries; call it once."""
        await self._consumer.open()
        self.broker.on_reconnect(self._reconnected)

    @property
    def _bytes(self) -> int:
        return max(PULL_BYTES, 2 * self.broker.client.max_payload)

    async def _reconnected(self) -> None:
        # The broker drops pulls when a connection ends: the pending pull would never be answered.
        self._is_doubtful = True
        self._consumer.forget()
        self._wake.set()

    async def verify(self) -> LogState:
        """Verify the stream and its consumer, create what is missing, and return their state.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        await self.broker.apply(self.topology, wait=0)  # the caller retries
        info = await self._durables.info(self.spec.stream, self.spec.durable)
        if info is None:
            raise BrokerUnavailable(f"there is no consumer {self.spec.durable}")
        state = await self.state()  # after the consumer's info, whose delivered sequence is then within these bounds
        self._ack_all = info.config.get("ack_policy") == "all"
        return LogState(
            incarnation=state.incarnation,
            first_seq=state.first_seq,
            last_seq=state.last_seq,
            delivered_seq=info.delivered.stream_seq,
            base=state.base,
            lost=state.lost,
            reused=state.reused,
        )

    async def state(self) -> StreamState:
        """Return the log's bounds and incarnation; a new incarnation means that it was recreated or has lost its end.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        return await self.logs.state(self.partition)

    async def stamp(self, seq: int) -> int | None:
        """Return the storage time of the message ``seq`` in nanoseconds since 1970, or None if it does not exist.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        return await self.broker.stamp(self.spec.stream, seq)

    async def reset(self, after: int) -> None:
        """Recreate the consumer, to deliver the messages after the stream sequence ``after``.

        Raises:
            BrokerUnavailable: the broker does not answer, or refuses.
        """
        try:
            await self._durables.reset(self.spec, after)
        except APIError as error:
            raise BrokerUnavailable(str(error)) from error

    async def pull(self) -> Pulled:
        """Return the events stored since the last pull, at most ``batch``, every ``interval`` seconds.

        Pulling in intervals costs broker and billing about half as much CPU as a push of each event.

        Raises:
            BrokerUnavailable: the request cannot be sent.
        """
        self._wake.clear()
        if not self._hurry:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.interval):
                    await self._wake.wait()
        arrived = await self._consumer.fetch(self.batch, max_bytes=self._bytes)
        self._hurry = len(arrived) >= self.batch
        pulled = Pulled(arrived, full=self._hurry, doubtful=self._is_doubtful or self._consumer.end in _DOUBTFUL)
        self._is_doubtful = False
        if self._consumer.end in (End.GONE, End.REFUSED):
            log.info("pull ended early", stream=self.spec.stream, reason=self._consumer.reason)
        if arrived:
            pulled.pending = stored_at(arrived[-1][1]).pending
        return pulled

    async def acknowledge(self, pulled: Pulled) -> None:
        """Acknowledge all of ``pulled``. A lost acknowledgement only leads to a repeat.

        Raises:
            BrokerUnavailable: it cannot be sent.
        """
        if not pulled.arrived:
            return
        replies = [reply for _, reply, _ in pulled.arrived]
        # With ack policy "all", one acknowledgement for the whole pull saves 5 µs of CPU an event, half of them
        # in the broker.
        for reply in [max(replies, key=stored_at)] if self._ack_all else replies:
            await self.broker.publish(reply.decode(), b"")

    async def between(self, first: int, last: int) -> AsyncIterator[list[Record]]:
        """Yield the messages still in the log from stream sequence ``first`` to ``last``, in order, in batches.

        Raises:
            BrokerUnavailable: the broker did not answer completely.
        """
        async for batch in self.broker.read(self.spec.stream, self.spec.filter, first, up_to=last):
            yield _records(await self._mended(batch, first))
            first = batch[-1].seq + 1
        if first <= last and (rest := await self._kept(range(first, last + 1))):
            yield _records(rest)

    async def highest_epochs(self, groups: Iterable[Group]) -> dict[Key, int]:
        """Return the highest epoch in the log of each generation, zombies' included.

        Raises:
            BrokerUnavailable: the broker did not answer completely.
        """
        stream = self.spec.stream
        return {
            one.key: await highest_kept_epoch(self.broker.read(stream, token_subject(one.address))) for one in groups
        }

    async def _mended(self, batch: list[Stored], first: int) -> list[Stored]:
        if batch[-1].seq - first + 1 == len(batch):
            return batch
        missing = sorted(set(range(first, batch[-1].seq + 1)) - {m.seq for m in batch})
        return sorted([*batch, *await self._kept(missing)], key=lambda m: m.seq)

    async def _kept(self, seqs: range | list[int]) -> list[Stored]:
        """Get single messages from the stream's leader: a lagging replica may have answered without them."""
        if not await self.broker.is_replicated(self.spec.stream):
            return []
        state = await self.broker.state(self.spec.stream)
        kept = []
        for seq in seqs:
            if not state.first_seq <= seq <= state.last_seq:
                continue
            if (stored := await self.broker.get(self.spec.stream, seq)) is not None:
                kept.append(stored)
        return kept


def _pulled(subject: bytes, reply: bytes, data: bytes) -> Record:
    place = stored_at(reply)
    return read_record(place.seq, subject.decode(), data, place.stamp)


def _records(messages: list[Stored]) -> list[Record]:
    """Decode messages as records; only the last stamp is read, because only that one can become a position's."""
    records = [read_record(m.seq, m.subject, m.data) for m in messages]
    records[-1] = records[-1]._replace(stamp=nanoseconds(messages[-1].time))
    return records
