"""The broker port of the services: a connection, its streams, and reads of them."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec
import nats.errors
import structlog

from schemas.log_marks import incarnation
from schemas.topology import BUCKET, Topology
from services.kit.jetstream import api
from services.kit.jetstream.admin import APPLY_SECONDS, NotReady, Refused, apply_topology, token_partitions
from services.kit.jetstream.bucket import Bucket
from services.kit.jetstream.client import RelayClient, header_number, parse_headers, parse_status
from services.kit.jetstream.connection import Connection
from services.kit.jetstream.errors import APIError, BrokerUnavailable, ReadFailed, unavailable
from services.kit.stamps import nanoseconds

__all__ = ["Broker", "BrokerUnavailable", "ReadFailed", "Stored", "StreamState"]

log = structlog.get_logger()
T = TypeVar("T")
READ_BATCH: Final = 1_000
SUBJECTS_PAGE: Final = 100_000
"""Bound of subjects that the server lists in one answer."""
INFO_SECONDS: Final = 2.0
READ_BYTES: Final = 512 * 1024
READS: Final = 16  # concurrent: data that the server sends ahead must stay far below its limit for a connection (64 MB)
READ_TIMEOUT: Final = 5.0
READ_TRIES: Final = (1.0, 1.5, 2.5)
"""Seconds without any answer per try, `READ_TIMEOUT` in all: one replica may be frozen while the next is not."""
LAG_PAUSE: Final = 0.05
REPLICAS_SECONDS: Final = 30.0


class Stored(msgspec.Struct, frozen=True):
    """One stored message: ``seq`` is its stream sequence, ``time`` its storage time if known.

    ``headers``: of a message read by itself; ``None`` in messages of `Broker.read`.
    """

    seq: int
    subject: str
    data: bytes
    time: str = ""
    headers: dict[str, str] | None = None


class StreamState(msgspec.Struct, frozen=True):
    """The current state of a stream. ``created`` is its time of creation; ``first_seq`` and ``last_seq`` bound its
    messages.

    ``used``: used share of its bound in bytes, from 0 to 1; 0 without a bound. ``last_stamp``: storage time of the last
    message, in nanoseconds since 1970 (0: never). ``holes``: messages missing between the bounds. ``max_age``: seconds
    after which messages expire (0: never). ``era``, ``base``, ``lost``, ``reused`` and ``repaired`` exist for logs
    only: see `schemas.log_marks`.
    """

    created: str
    first_seq: int
    last_seq: int
    used: float = 0.0
    last_stamp: int = 0
    holes: int = 0
    max_age: float = 0.0
    era: str = ""
    base: int = 0
    lost: int = 0
    reused: bool = False
    repaired: bool = True

    @property
    def incarnation(self) -> str:
        """Return the incarnation, to which positions in this stream belong."""
        return incarnation(self.created, self.era)


class _Info(msgspec.Struct):
    class _State(msgspec.Struct):
        first_seq: int
        last_seq: int
        bytes: int = 0
        last_ts: str = ""
        num_deleted: int = 0
        subjects: dict[str, int] = {}

    class _Config(msgspec.Struct):
        max_bytes: int = -1
        max_age: int = 0
        num_replicas: int = 1

    created: str
    state: _State
    config: _Config


class _Got(msgspec.Struct):
    class _Message(msgspec.Struct):
        subject: str
        seq: int
        data: bytes = b""  # base64 in JSON, as are the headers
        hdrs: bytes = b""
        time: str = ""

    message: _Message


class _Done(msgspec.Struct):
    success: bool = False


class Broker(Connection):
    """A connection to NATS with JetStream: stream states, reads, look-up buckets, and topology."""

    def __init__(self, client: RelayClient) -> None:
        super().__init__(client)
        self._reads = asyncio.Semaphore(READS)
        self._buckets: dict[str, Bucket] = {}
        self._applying: asyncio.Task[None] | None = None
        self._replicas: dict[str, tuple[float, int]] = {}  # replicas by stream, with the time of the look-up

    async def state(self, stream: str) -> StreamState:
        """Return incarnation and bounds of a stream.

        Raises:
            BrokerUnavailable: no answer.
        """
        info = await self._info(stream)
        bound = info.config.max_bytes
        used = info.state.bytes / bound if bound > 0 else 0.0
        state = info.state
        stamp = nanoseconds(state.last_ts)
        max_age = info.config.max_age / 1e9
        return StreamState(info.created, state.first_seq, state.last_seq, used, stamp, state.num_deleted, max_age)

    async def _info(self, stream: str, query: Any = None, *, timeout: float = INFO_SECONDS) -> _Info:
        return await self._ask(f"STREAM.INFO.{stream}", _Info, query, timeout=timeout)

    async def _ask(self, operation: str, type_: type[T], query: Any = None, *, timeout: float = api.ASK_SECONDS) -> T:
        """Send a JetStream API request whose refusals are all temporary.

        Raises:
            BrokerUnavailable: no answer, or a refusal: a missing stream will be created by some service.
        """
        try:
            return await api.ask(self, operation, type_, query, timeout=timeout)
        except APIError as error:
            raise BrokerUnavailable(f"{operation}: {error}") from error

    async def holds(self, stream: str, subject: str) -> bool:
        """Return whether a stream's leader still holds a message of this subject.

        Raises:
            BrokerUnavailable: no answer.
        """
        return subject in (await self._info(stream, {"subjects_filter": subject})).state.subjects

    async def count(self, stream: str, filter_: str) -> int:
        """Return the number of messages of ``filter_`` on a stream's leader, for at most 100,000 subjects.

        Raises:
            BrokerUnavailable: no answer.
        """
        return sum((await self._info(stream, {"subjects_filter": filter_})).state.subjects.values())

    async def subjects(self, stream: str, filter_: str) -> list[str]:
        """Return the subjects matching ``filter_`` with messages on a stream's leader.

        Raises:
            BrokerUnavailable: no answer.
        """
        found: list[str] = []
        while True:
            query = {"subjects_filter": filter_, "offset": len(found)}
            page = (await self._info(stream, query, timeout=api.ASK_SECONDS)).state.subjects
            found += page
            if len(page) < SUBJECTS_PAGE:
                return found

    async def last(self, stream: str, filter_: str) -> Stored | None:
        """Return the newest message that matches ``filter_`` from the stream's leader, or None.

        Raises:
            BrokerUnavailable: no answer.
        """
        return await self._one(stream, {"last_by_subj": filter_})

    async def get(self, stream: str, seq: int) -> Stored | None:
        """Return the message ``seq`` from the stream's leader, or None.

        Raises:
            BrokerUnavailable: no answer.
        """
        return await self._one(stream, {"seq": seq})

    async def _one(self, stream: str, query: dict[str, Any], *, timeout: float = api.ASK_SECONDS) -> Stored | None:
        operation = f"STREAM.MSG.GET.{stream}"
        try:
            found = (await api.ask(self, operation, _Got, query, timeout=timeout)).message
        except APIError as error:
            if error.is_missing:
                return None
            raise BrokerUnavailable(f"cannot read {stream} ({query}): {error}") from error
        headers = parse_headers(found.hdrs) if found.hdrs else None
        return Stored(found.seq, found.subject, found.data, found.time, headers)

    async def stamp(self, stream: str, seq: int) -> int | None:
        """Return the storage time of the message ``seq`` on the leader, in nanoseconds since 1970, or None.

        Raises:
            BrokerUnavailable: no answer.
        """
        found = await self._one(stream, {"seq": seq}, timeout=INFO_SECONDS)
        return None if found is None else nanoseconds(found.time)

    async def first_since(self, stream: str, filter_: str, stamp: int) -> int | None:
        """Return the stream sequence of the first message stored at ``stamp`` or later (nanoseconds since 1970).

        Raises:
            ReadFailed: the broker did not answer completely.
        """
        seconds, rest = divmod(stamp, 1_000_000_000)
        moment = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"
        found, _ = await self._get(stream, {"start_time": moment, "next_by_subj": filter_, "batch": 1})
        return found[0].seq if found else None

    async def first_hole(self, stream: str, filter_: str, first: int, last: int) -> int:
        """Return the first stream sequence missing in a range, or ``last + 1``; ``filter_`` must match all messages.

        Raises:
            ReadFailed: the broker did not answer completely.
        """

        async def stored(seq: int) -> int:
            found, pending = await self._get(stream, {"seq": seq, "next_by_subj": filter_, "batch": 1})
            return len(found) + pending

        beyond = await stored(last + 1)
        low, high = first, last + 1  # nothing is missing before ``low``
        missing = last - first + 1 - (await stored(first) - beyond)
        if not missing:
            return last + 1
        while high - low > 1:  # bisect: up to the first hole, as much is missing behind a sequence as in all
            middle = (low + high) // 2
            if last - middle + 1 - (await stored(middle) - beyond) == missing:
                low = middle
            else:
                high = middle
        return low

    async def lasts(self, stream: str, filter_: str) -> list[Stored]:
        """Return the newest stored message of each subject that matches ``filter_`` (at most 1,024 subjects).

        Raises:
            ReadFailed: the broker did not answer completely, or there are more subjects.
        """
        return (await self._get(stream, {"multi_last": [filter_], "batch": 1_024, "max_bytes": READ_BYTES}))[0]

    async def first(self, stream: str, filter_: str, from_seq: int = 1) -> Stored | None:
        """Return the first stored message at or after ``from_seq`` that matches ``filter_``, or None."""
        async for batch in self.read(stream, filter_, from_seq, limit=1):
            return batch[0]
        return None

    async def read(
        self, stream: str, filter_: str, from_seq: int = 1, *, up_to: int | None = None, limit: int | None = None
    ) -> AsyncIterator[list[Stored]]:
        """Yield the messages of ``filter_`` from ``from_seq`` on, in order, in batches (batched Direct Get).

        Ends at the last stored message, after ``up_to`` (a stream sequence), or after ``limit`` messages. In a cluster
        any replica may answer, also a lagging one: the leader defines the end, and a replica behind it is asked again.

        Raises:
            ReadFailed: the broker did not answer completely.
        """
        taken = 0
        end: int | None = None  # the leader's last sequence when a replica had no more messages
        patience_until = asyncio.get_running_loop().time() + READ_TIMEOUT
        while up_to is None or from_seq <= up_to:
            size = READ_BATCH if limit is None else min(READ_BATCH, limit - taken)
            if up_to is not None:  # every message has a sequence of its own: the range bounds their number
                size = min(size, up_to - max(1, from_seq) + 1)
            batch, pending = await self._read_batch(stream, filter_, max(1, from_seq), size)
            cut = up_to is not None and bool(batch) and batch[-1].seq > up_to
            if up_to is not None and cut:
                batch, pending = [m for m in batch if m.seq <= up_to], 0
            if batch:
                taken += len(batch)
                from_seq = batch[-1].seq + 1
                yield batch
            if cut or (limit is not None and taken >= limit) or (up_to is not None and from_seq > up_to):
                return
            if batch and pending > 0:
                continue
            ends_at = await self._leaders_end(stream, filter_)
            end = ends_at if end is None else min(end, ends_at)
            if from_seq > end:
                return
            if asyncio.get_running_loop().time() > patience_until:
                raise ReadFailed(f"reading {stream}: a replica is at {from_seq - 1} and the leader at {end}")
            await asyncio.sleep(LAG_PAUSE)

    async def _leaders_end(self, stream: str, filter_: str) -> int:
        """Return the leader's last stored sequence of ``filter_``; 0 for a stream without replicas."""
        if not await self.is_replicated(stream):
            return 0
        last = await self.last(stream, filter_)
        return last.seq if last is not None else 0

    async def is_replicated(self, stream: str) -> bool:
        """Return whether a stream has several replicas, one of which may lag behind another.

        Raises:
            BrokerUnavailable: no answer.
        """
        now = asyncio.get_running_loop().time()
        known = self._replicas.get(stream)
        if known is None or now - known[0] > REPLICAS_SECONDS:
            known = self._replicas[stream] = (now, (await self._info(stream)).config.num_replicas)
        return known[1] > 1

    async def _read_batch(self, stream: str, filter_: str, from_seq: int, size: int) -> tuple[list[Stored], int]:
        query = {"seq": from_seq, "next_by_subj": filter_, "batch": size, "max_bytes": READ_BYTES}
        return await self._get(stream, query)

    async def _get(self, stream: str, query: dict[str, Any]) -> tuple[list[Stored], int]:
        """Return the messages of a batched Direct Get and the number left over; retry if no replica answers."""
        for seconds in READ_TRIES:
            try:
                async with self._reads:
                    return await self._get_once(stream, query, seconds)
            except TimeoutError:
                continue
            except (nats.errors.Error, OSError) as error:
                raise ReadFailed(f"reading {stream} ({query}): {error!r}") from error
        raise ReadFailed(f"reading {stream} ({query}): no answer in {READ_TIMEOUT} s")

    async def _get_once(self, stream: str, query: dict[str, Any], seconds: float) -> tuple[list[Stored], int]:
        got: list[Stored] = []
        loop = asyncio.get_running_loop()
        done: asyncio.Future[int] = loop.create_future()
        patience = asyncio.timeout(seconds)

        def receive(data: bytes, block: bytes | None) -> None:
            if done.done() or patience.expired():  # an expired one cannot be extended, and the parser must not fail
                return
            if not got:  # it answers: do not ask twice because of a slow answer
                patience.reschedule(loop.time() + READ_TIMEOUT)
            block = block or b""
            seq, status = header_number(block, b"Nats-Sequence: "), parse_status(block)
            if seq is not None:
                fields = parse_headers(block)
                got.append(Stored(seq, fields.get("Nats-Subject", ""), data, fields.get("Nats-Time-Stamp", "")))
            elif status[0] == "204":
                done.set_result(header_number(block, b"Nats-Num-Pending: ") or 0)
            elif status[0] == "404":
                done.set_result(0)
            else:
                done.set_exception(ReadFailed(f"reading {stream}: {status[0]} {status[1]}"))

        token = b""
        try:
            async with patience:
                token = await self.client.ask(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(query), receive)
                return got, await done
        finally:
            self.client.forget(token)

    async def purge(self, stream: str, filter_: str) -> None:
        """Remove all messages whose subject matches ``filter_`` from a stream.

        Raises:
            BrokerUnavailable: no answer, or there is no such stream.
        """
        await self._ask(f"STREAM.PURGE.{stream}", _Done, {"filter": filter_})

    async def delete(self, stream: str, seq: int) -> bool:
        """Delete the message ``seq`` from a stream; return whether it existed.

        Raises:
            BrokerUnavailable: no answer.
        """
        try:
            await api.ask(self, f"STREAM.MSG.DELETE.{stream}", _Done, {"seq": seq})
        except APIError as error:
            if error.is_missing:
                return False
            raise BrokerUnavailable(f"cannot remove {seq} from {stream}: {error}") from error
        return True

    async def bucket(self, name: str = BUCKET) -> Bucket:
        """Return a look-up bucket: that of generations, or the registry of models.

        Raises:
            BrokerUnavailable: no answer, or there is no such bucket.
        """
        if name not in self._buckets:
            with unavailable(f"no bucket {name}"):
                self._buckets[name] = Bucket(name, await self.js.key_value(name))
        return self._buckets[name]

    async def apply(self, topology: Topology, *, wait: float = APPLY_SECONDS) -> Topology:
        """Create or update streams, consumers and buckets; return the topology with the partitions of earlier settings.

        Calling it again changes nothing. Retries for ``wait`` seconds while a cluster has no leader yet.

        Raises:
            BrokerUnavailable: the broker refused or did not answer.
        """
        try:
            return await apply_topology(self, topology, wait)
        except (NotReady, Refused) as error:
            raise BrokerUnavailable(f"cannot set up streams: {error}") from error

    async def keep(self, topology: Topology) -> Topology:
        """Call `apply` now and after every reconnection: a broker may come back without some of the topology.

        Raises:
            BrokerUnavailable: the broker refused or did not answer, now.
        """

        async def again() -> None:
            if self._applying is None or self._applying.done():
                self._applying = asyncio.create_task(self._apply_again(topology))

        applied = await self.apply(topology)
        if topology.managed:
            self.on_reconnect(again)
        return applied

    async def _apply_again(self, topology: Topology) -> None:
        try:
            await self.apply(topology)
        except BrokerUnavailable as error:
            log.error("streams not verified after the reconnection", detail=str(error))

    async def partitions(self) -> list[int]:
        """Return the partitions that have a stream, including those beyond the configured number.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        try:
            return await token_partitions(self)
        except (NotReady, Refused) as error:
            raise BrokerUnavailable(f"cannot list streams: {error}") from error
