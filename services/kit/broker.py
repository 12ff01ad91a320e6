"""The connection to NATS: one thin port over nats-py, so that the rest knows nothing of the client library.

Hot paths use callbacks, never iterators.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Self
from urllib.parse import urlsplit

import msgspec
import nats
import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext
from nats.js import errors as js_errors
from nats.js.kv import KeyValue

from schemas.topology import BUCKET, Topology
from services.kit.nats_client import Arrival, RelayClient
from services.kit.streams import APPLY_SECONDS, NotReady, Refused, apply_topology, token_partitions

__all__ = ["Broker", "BrokerUnavailable", "ReadFailed", "Stored", "StreamState"]

log = structlog.get_logger()

Callback = Callable[[Msg], Awaitable[None]]
READ_BATCH: Final = 1_000
READ_BYTES: Final = 512 * 1024
READS: Final = 16  # at once: what the server sends ahead must stay far below its limit for a connection (64 MB)
READ_TIMEOUT: Final = 5.0
LAG_PAUSE: Final = 0.05
REPLICAS_SECONDS: Final = 30.0
PENDING_BYTES: Final = 8 * 1024 * 1024


class BrokerUnavailable(Exception):
    """The broker cannot be reached or does not answer; asking again later may help."""


class ReadFailed(BrokerUnavailable):
    """A read of the log got no complete answer within its time."""


class Stored(msgspec.Struct, frozen=True):
    """One stored message: ``seq`` is its stream sequence."""

    seq: int
    subject: str
    data: bytes


class StreamState(msgspec.Struct, frozen=True):
    """A stream now. ``created`` is its incarnation; ``first_seq`` and ``last_seq`` bound what it keeps.

    ``used``: how much of its bound in bytes is taken, from 0 to 1; 0 without a bound.
    """

    created: str
    first_seq: int
    last_seq: int
    used: float = 0.0


class _Info(msgspec.Struct):
    class _State(msgspec.Struct):
        first_seq: int
        last_seq: int
        bytes: int = 0

    class _Config(msgspec.Struct):
        max_bytes: int = -1
        num_replicas: int = 1

    created: str
    state: _State
    config: _Config


class Broker:
    """A connection to NATS with JetStream.

    ``on_reconnect`` callbacks run after every reconnection, so that readers look for what they missed.
    """

    def __init__(self, client: RelayClient) -> None:
        self.client = client
        self.js: JetStreamContext = client.jetstream(timeout=5.0)
        self._closing = False
        self._reads = asyncio.Semaphore(READS)
        self._reconnected: list[Callable[[], Awaitable[None]]] = []
        self._buckets: dict[str, KeyValue] = {}
        self._replicas: dict[str, tuple[float, int]] = {}  # of each stream, and when that was looked up

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, name: str, *, tls: ssl.SSLContext | None = None, wait: float = 30.0
    ) -> AsyncIterator[Self]:
        """Connect (trying for ``wait`` seconds), yield, and close in the end. ``url`` may list servers by commas.

        ``name``: the service; answers come below ``_INBOX.<name>``, so that no other service may read them. ``tls``:
        demands it of every server.

        Raises:
            BrokerUnavailable: no server answered within ``wait`` seconds.
        """
        client = RelayClient()
        self = cls(client)
        servers = [part.strip() for part in url.split(",")]
        first = urlsplit(servers[0])

        async def reconnected() -> None:
            log.info("broker reconnected")
            for callback in self._reconnected:
                await callback()

        async def disconnected() -> None:
            if not self._closing:
                log.warning("broker disconnected")

        reason: Exception | None = None

        async def errored(error: Exception) -> None:
            nonlocal reason
            reason = error
            log.debug("broker error", error=repr(error))

        try:
            async with asyncio.timeout(wait):
                await client.connect(
                    servers,
                    # Servers of a cluster tell of each other without credentials: the first one's are good for all.
                    user=first.username if first.password else None,
                    password=first.password,
                    name=f"tailrace-{name}",
                    inbox_prefix=f"_INBOX.{name}",
                    tls=tls,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.25,  # type: ignore[arg-type]  # seconds; fractions work
                    connect_timeout=2,
                    ping_interval=2,  # a server that is frozen is left after about 5 s, well within the lease
                    max_outstanding_pings=2,
                    pending_size=PENDING_BYTES,
                    reconnected_cb=reconnected,
                    disconnected_cb=disconnected,
                    error_cb=errored,
                )
        except (TimeoutError, OSError, nats.errors.Error) as error:
            raise BrokerUnavailable(f"no NATS server answers at {_hide(url)}: {reason or error!r}") from error
        try:
            yield self
        finally:
            self._closing = True
            if not client.is_closed:
                with suppress(nats.errors.Error, OSError, RuntimeError):  # a connection being lost takes no write
                    await client.close()

    @property
    def is_connected(self) -> bool:
        """Whether the connection is up now."""
        return bool(self.client.is_connected)

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Call ``callback`` after every reconnection."""
        self._reconnected.append(callback)

    async def publish(
        self, subject: str, data: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Publish on a core subject; with ``reply`` the stream's acknowledgement comes there.

        Raises:
            BrokerUnavailable: the outgoing buffer is full or the connection is closed.
        """
        try:
            await self.client.publish(subject, data, reply=reply, headers=headers)
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable(f"cannot publish: {error!r}") from error

    async def publish_stored(self, subject: str, data: bytes, *, headers: dict[str, str] | None = None) -> int:
        """Publish to a stream and wait for the acknowledgement; return the stream sequence.

        Raises:
            BrokerUnavailable: no acknowledgement came.
            nats.js.errors.APIError: the stream refused it.
        """
        try:
            ack = await self.js.publish(subject, data, headers=headers)
        except js_errors.APIError:
            raise
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable(f"no acknowledgement: {error!r}") from error
        return ack.seq

    async def subscribe(
        self, subject: str, callback: Callback, *, pending_bytes: int = 64 * 1024 * 1024
    ) -> Subscription:
        """Subscribe a callback to a core subject. The broker may not know it yet: see `flush`."""
        return await self.client.subscribe(subject, cb=callback, pending_bytes_limit=pending_bytes)

    async def listen(self, subject: str, arrival: Arrival) -> Subscription:
        """Subscribe a plain function to a core subject that carries tokens: see `services.kit.nats_client`."""
        return await self.client.listen(subject, arrival)

    async def unlisten(self, subscription: Subscription) -> None:
        """End a subscription made by `listen`."""
        await self.client.unlisten(subscription)

    def send(self, subject: str, data: bytes, reply: str) -> None:
        """Publish on a valid subject with the next flush, the acknowledgement to ``reply``; only while connected.

        Raises:
            BrokerUnavailable: the outgoing buffer is full.
        """
        try:
            self.client.send(subject, reply, data)
        except BufferError as error:
            raise BrokerUnavailable(f"cannot publish: {error}") from error

    async def flush(self) -> None:
        """Return when the broker has seen all that was sent before, for instance a subscription.

        Raises:
            BrokerUnavailable: it did not answer.
        """
        try:
            await self.client.flush(timeout=5)
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable(f"the broker does not answer: {error!r}") from error

    async def request(
        self, subject: str, data: bytes = b"", *, timeout: float = 2.0, headers: dict[str, str] | None = None
    ) -> bytes | None:
        """Return the answer of whoever listens on ``subject``; ``None`` when nobody does.

        Raises:
            BrokerUnavailable: somebody listens and no answer came in time, or the connection is down.
        """
        try:
            return (await self.client.request(subject, data, timeout=timeout, headers=headers)).data
        except nats.errors.NoRespondersError:
            return None
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise BrokerUnavailable(f"no answer on {subject}: {error!r}") from error

    async def state(self, stream: str) -> StreamState:
        """Return incarnation and bounds of a stream.

        Raises:
            BrokerUnavailable: no answer.
        """
        info = await self._info(stream)
        bound = info.config.max_bytes
        used = info.state.bytes / bound if bound > 0 else 0.0
        return StreamState(info.created, info.state.first_seq, info.state.last_seq, used)

    async def _info(self, stream: str) -> _Info:
        data = await self.request(f"$JS.API.STREAM.INFO.{stream}")
        try:
            return msgspec.json.decode(data or b"", type=_Info)
        except msgspec.DecodeError as error:
            raise BrokerUnavailable(f"no stream {stream}: {(data or b'')[:200]!r}") from error

    async def last(self, stream: str, filter_: str) -> Stored | None:
        """Return the newest stored message that matches ``filter_``, as the stream's leader has it, if there is any."""
        try:
            raw = await self.js.get_last_msg(stream, filter_)
        except js_errors.NotFoundError:
            return None
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise BrokerUnavailable(f"cannot read {stream}: {error!r}") from error
        return Stored(raw.seq or 0, raw.subject or "", raw.data or b"")

    async def lasts(self, stream: str, filter_: str) -> list[Stored]:
        """Return the newest stored message of each subject that matches ``filter_`` (at most 1,024 subjects).

        Raises:
            ReadFailed: the broker did not answer completely, or there are more subjects.
        """
        return (await self._get(stream, {"multi_last": [filter_], "batch": 1_024, "max_bytes": READ_BYTES}))[0]

    async def first(self, stream: str, filter_: str, from_seq: int = 1) -> Stored | None:
        """Return the first stored message at or after ``from_seq`` that matches ``filter_``; ``None`` without one."""
        async for batch in self.read(stream, filter_, from_seq, limit=1):
            return batch[0]
        return None

    async def read(
        self, stream: str, filter_: str, from_seq: int = 1, *, up_to: int | None = None, limit: int | None = None
    ) -> AsyncIterator[list[Stored]]:
        """Yield what the log keeps of ``filter_`` from ``from_seq`` on, in order, in batches (batched Direct Get).

        Ends at the last stored message, after ``up_to`` (a stream sequence), or after ``limit`` messages. In a cluster
        any replica may answer, also one that lags: the end is the leader's, and a replica behind it is asked again.

        Raises:
            ReadFailed: the broker did not answer completely.
        """
        taken = 0
        end: int | None = None  # what the leader called the last one when a replica had no more
        patience_until = asyncio.get_running_loop().time() + READ_TIMEOUT
        while True:
            size = READ_BATCH if limit is None else min(READ_BATCH, limit - taken)
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
        """Return the sequence of the last stored message of ``filter_``; 0 where every answer is the leader's."""
        if not await self._is_replicated(stream):
            return 0
        last = await self.last(stream, filter_)
        return last.seq if last is not None else 0

    async def _is_replicated(self, stream: str) -> bool:
        now = asyncio.get_running_loop().time()
        known = self._replicas.get(stream)
        if known is None or now - known[0] > REPLICAS_SECONDS:
            known = self._replicas[stream] = (now, (await self._info(stream)).config.num_replicas)
        return known[1] > 1

    async def _read_batch(self, stream: str, filter_: str, from_seq: int, size: int) -> tuple[list[Stored], int]:
        query = {"seq": from_seq, "next_by_subj": filter_, "batch": size, "max_bytes": READ_BYTES}
        return await self._get(stream, query)

    async def _get(self, stream: str, query: dict[str, Any]) -> tuple[list[Stored], int]:
        """Return what a batched Direct Get brings, and how much was left over."""
        got: list[Stored] = []
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def receive(msg: Msg) -> None:
            headers = msg.headers or {}
            status = headers.get("Status")
            if done.done():
                return
            if status is None:
                got.append(Stored(int(headers["Nats-Sequence"]), headers["Nats-Subject"], msg.data))
            elif status == "204":
                done.set_result(int(headers.get("Nats-Num-Pending", "0")))
            elif status == "404":
                done.set_result(0)
            else:
                done.set_exception(ReadFailed(f"reading {stream}: {status} {headers.get('Description', '')}"))

        inbox = self.client.new_inbox()
        try:
            async with self._reads:
                subscription = await self.subscribe(inbox, receive)
                try:
                    await self.client.publish(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(query), reply=inbox)
                    async with asyncio.timeout(READ_TIMEOUT):
                        return got, await done
                finally:
                    if not self.client.is_closed:
                        await subscription.unsubscribe()
        except TimeoutError as error:
            raise ReadFailed(f"reading {stream} ({query}): no answer in {READ_TIMEOUT} s") from error
        except (nats.errors.Error, OSError) as error:
            raise ReadFailed(f"reading {stream} ({query}): {error!r}") from error

    async def bucket(self, name: str = BUCKET) -> KeyValue:
        """Return a look-up bucket: that of generations, or the registry of models."""
        if name not in self._buckets:
            self._buckets[name] = await self.js.key_value(name)
        return self._buckets[name]

    async def apply(self, topology: Topology, *, wait: float = APPLY_SECONDS) -> Topology:
        """Create or update streams, consumers and buckets; return the topology with the partitions kept from earlier.

        Calling it again changes nothing. A cluster that has no leader yet is asked again for ``wait`` seconds.

        Raises:
            BrokerUnavailable: the broker refused or did not answer.
        """
        try:
            return await apply_topology(self, topology, BrokerUnavailable, wait)
        except (NotReady, Refused) as error:
            raise BrokerUnavailable(f"cannot set up streams: {error}") from error

    async def partitions(self) -> list[int]:
        """Return the partitions that have a stream, those beyond the present number included.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        try:
            return await token_partitions(self)
        except (NotReady, Refused) as error:
            raise BrokerUnavailable(f"cannot list streams: {error}") from error


def _hide(url: str) -> str:
    return ",".join(part.rsplit("@", 1)[-1] for part in url.split(","))
