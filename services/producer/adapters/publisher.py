"""Append to the log: pipelined, bounded, go-back-N.

One `Publisher` serves a connection: a single inbox receives all acknowledgements. Each generation has a `LogWriter`
with a window of unacknowledged events. A full window makes `LogWriter.publish` wait, so backpressure reaches the
provider. After a refusal or a missing acknowledgement all events from the first unacknowledged one on are sent again;
readers drop the repeats by the acceptance rule. A slow log must not be flooded with repeats: an acknowledgement of an
earlier run shows that the later run is still queued, and without any answer the repeats become less frequent.
"""

import asyncio
from collections import deque
from typing import Final

import msgspec
import structlog

from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.connection import expecting
from services.kit.jetstream.errors import APIError
from services.producer.errors import Fenced, LogRefused, LogUnavailable
from services.producer.metrics import APPENDED_STAGE, LOG_REFUSALS, PUBLISH_REPEATS, PUBLISH_WINDOW

__all__ = ["Lease", "LogWriter", "Publisher"]

log = structlog.get_logger()
WINDOW_EVENTS: Final = 512
WINDOW_BYTES: Final = 4 * 1024 * 1024
LAPSED_PAUSE: Final = 0.1
STUCK_SECONDS: Final = 6.0
RARER: Final = 3
"""Number of times that the pause between two repeats doubles."""


class _Refusal(msgspec.Struct):
    class _Error(msgspec.Struct):
        code: int = 0
        description: str = ""

    error: _Error | None = None


class Lease:
    """The right to publish, until ``until`` (event-loop time). Renewed by the queue's heartbeat.

    An expired lease has lapsed, and can be renewed; ``is_lost``: another producer has claimed the request.
    """

    __slots__ = ("is_lost", "until")

    def __init__(self, until: float) -> None:
        self.until = until
        self.is_lost = False

    def is_over(self) -> bool:
        """Return whether it has lapsed or is lost."""
        return self.is_lost or asyncio.get_running_loop().time() > self.until


class Publisher:
    """Route acknowledgements to the writers of one connection; let writers go back when they are missing.

    ``ack_timeout``: seconds without progress after which a writer goes back first. ``give_up``: seconds without any
    progress after which it raises `LogUnavailable`.
    """

    def __init__(self, broker: Broker, *, ack_timeout: float = 2.0, give_up: float = 60.0) -> None:
        self.broker = broker
        self.ack_timeout = ack_timeout
        self.give_up = give_up
        self.inbox = broker.client.new_inbox()
        self._writers: dict[str, LogWriter] = {}
        self._next_writer = 0

    async def start(self) -> None:
        """Subscribe to acknowledgements."""
        PUBLISH_WINDOW.set_function(lambda: sum(writer.unacknowledged for writer in self._writers.values()))
        await self.broker.listen(f"{self.inbox}.*.*.*", self._receive)
        self.broker.on_reconnect(self._go_back_all)

    async def watch(self) -> None:
        """Let writers without acknowledgements go back; run until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.ack_timeout / 4)
            now = loop.time()
            for writer in list(self._writers.values()):
                if writer.unacknowledged and now - writer.progress_at > writer.patience:
                    writer.go_back(now)

    def resume(self, lease: Lease) -> None:
        """Send the events held back in the windows while the lease was lapsed."""
        now = asyncio.get_running_loop().time()
        for writer in list(self._writers.values()):
            if writer.lease is lease and writer.unacknowledged:
                writer.go_back(now)

    def is_stuck(self) -> bool:
        """Return whether a writer has had no acknowledgement for `STUCK_SECONDS` while the broker is connected."""
        now = asyncio.get_running_loop().time()
        return self.broker.is_connected and any(w.stuck_for(now) > STUCK_SECONDS for w in self._writers.values())

    def writer(self, subject: str, lease: Lease) -> "LogWriter":
        """Return a writer for one generation's subject; close it when done."""
        self._next_writer += 1
        name = format(self._next_writer, "x")
        writer = LogWriter(self, name, subject, lease)
        self._writers[name] = writer
        return writer

    def forget(self, name: str) -> None:
        """Drop a writer; later acknowledgements for it are ignored."""
        self._writers.pop(name, None)

    def _receive(self, subject: str, data: bytes, headers: bytes) -> None:
        _, name, run, number = subject.rsplit(".", 3)
        writer = self._writers.get(name)
        if writer is None:
            return
        if not headers and b'"error"' not in data:
            writer.acknowledge(int(run), int(number))
        else:
            writer.refuse(_reason(data, headers))

    async def _go_back_all(self) -> None:
        now = asyncio.get_running_loop().time()
        for writer in list(self._writers.values()):
            if writer.unacknowledged:
                writer.go_back(now)


def _reason(data: bytes, headers: bytes) -> str:
    if headers.startswith(b"NATS/1.0 503"):
        return "no stream answers"
    try:
        refusal = msgspec.json.decode(data, type=_Refusal)
    except msgspec.DecodeError:
        return f"unreadable acknowledgement {data[:80]!r}"
    return refusal.error.description if refusal.error else "unknown"


class LogWriter:
    """Append one generation's events in order.

    Events stay in the window until the log has acknowledged them and all before them. While ``lease`` is lapsed they
    wait there unsent.
    """

    def __init__(self, publisher: Publisher, name: str, subject: str, lease: Lease) -> None:
        self.progress_at = asyncio.get_running_loop().time()
        self._publisher = publisher
        self._broker = publisher.broker
        self._name = name
        self._reply = f"{publisher.inbox}.{name}.0."
        self._run = 0  # number of times the writer has gone back
        self._repeats = 0  # number of times since the log's last answer
        self._subject = subject
        self.lease = lease
        self._window: deque[bytes] = deque()  # bounded by WINDOW_EVENTS and WINDOW_BYTES
        self._window_bytes = 0
        self._base = 0  # number of the first unacknowledged event
        self._first_at = self.progress_at  # when event 0 was sent
        self._acknowledged: set[int] = set()  # beyond the base; bounded by the window
        self._room: asyncio.Future[None] | None = None
        self._stuck_since: float | None = None
        self._reason = ""
        self._loop = asyncio.get_running_loop()

    @property
    def unacknowledged(self) -> int:
        """Return the number of unacknowledged events."""
        return len(self._window)

    @property
    def patience(self) -> float:
        """Return the seconds without progress after which the writer goes back."""
        return self._publisher.ack_timeout * 2.0 ** min(self._repeats, RARER)

    def stuck_for(self, now: float) -> float:
        """Return the seconds without an acknowledgement while events are under way."""
        return now - self._stuck_since if self._window and self._stuck_since is not None else 0.0

    async def publish(self, data: bytes) -> None:
        """Append one event: `enqueue` and `room` in one call."""
        self.enqueue([data])
        await self.room()

    def enqueue(self, batch: list[bytes]) -> None:
        """Put events into the window and send them; all or, if the lease is lost, none of them.

        The window may exceed its bound by one batch: call `room` before the next one.

        Raises:
            Fenced: the lease is lost.
        """
        self._check_lost()
        if not self._window:
            self.progress_at = self._loop.time()
            if not self._base:
                self._first_at = self.progress_at
        connected = self._may_send()
        number = self._base + len(self._window)
        for data in batch:
            self._window.append(data)
            self._window_bytes += len(data)
            if connected:
                self._send(number, data)
            number += 1

    async def room(self, size: int | None = None) -> None:
        """Wait while the window is full, or holds ``size`` bytes and more.

        Raises:
            Fenced: the lease is lost.
            LogUnavailable: the log has taken nothing for too long.
        """
        size = WINDOW_BYTES if size is None else size
        while len(self._window) >= WINDOW_EVENTS or self._window_bytes >= size:
            await self._progress()

    async def publish_first(self, data: bytes, last_seq: int) -> None:
        """Append ``data`` only if ``last_seq`` is still the last stream sequence of this subject (0: no message).

        Retry while the log is full or has no leader. If only the acknowledgement was lost, the repetition is refused,
        and the caller finds its own event in the log.

        Raises:
            LogRefused: another producer has written in between.
            Fenced: the lease has run out.
            LogUnavailable: the log has not taken it for too long.
        """
        headers = expecting(last_seq)
        began = self._loop.time()
        while True:
            # After its lease a producer may have read its successor's events: the condition alone is not a fence.
            self._check_lease()
            try:
                await self._broker.publish_stored(self._subject, data, headers=headers)
                return
            except APIError as error:
                if error.is_wrong_last_sequence:
                    raise LogRefused(f"{self._subject} has grown beyond {last_seq}") from error
                self.refuse(error.description)
            except BrokerUnavailable as error:
                self.refuse(str(error))
            now = self._loop.time()
            if now - began > self._publisher.give_up:
                raise LogUnavailable(1, now - began, self._reason)
            await asyncio.sleep(self._publisher.ack_timeout / 4)

    def _check_lost(self) -> None:
        if self.lease.is_lost:
            raise Fenced("the lease is lost: another producer has claimed the request")

    def _check_lease(self) -> None:
        self._check_lost()
        if self.lease.is_over():
            raise Fenced(f"the lease expired {self._loop.time() - self.lease.until:.1f} s ago")

    def _may_send(self) -> bool:
        return self._broker.is_connected and not self.lease.is_over()

    async def drain(self) -> None:
        """Wait until all events are acknowledged under a valid lease: no other producer has written before them.

        Wait for a lapsed lease as long as for the log.

        Raises:
            Fenced: the lease is lost, or stayed lapsed.
            LogUnavailable: the log has taken nothing for too long.
        """
        while self._window:
            await self._progress()
        while self.lease.is_over():
            self._check_lost()
            if self._loop.time() > self.lease.until + self._publisher.give_up:
                self._check_lease()
            await asyncio.sleep(LAPSED_PAUSE)

    def close(self) -> None:
        """Forget the events under way."""
        self._window.clear()
        self._publisher.forget(self._name)

    def acknowledge(self, run: int, number: int) -> None:
        """Take an acknowledgement: the log has stored event ``number`` as sent in ``run``.

        An acknowledgement of an earlier run does not count: it may refer to a copy stored after a missing event, which
        readers have dropped. But it shows that the log works, so there is no need to send again.
        """
        if run == self._run and not self._base <= number < self._base + len(self._window):
            return
        self.progress_at = self._loop.time()
        self._stuck_since = None
        self._repeats = 0
        if run != self._run:
            return
        if number != self._base:
            self._acknowledged.add(number)
            return
        if not self._base:
            APPENDED_STAGE.observe(self.progress_at - self._first_at)
        while True:
            self._window_bytes -= len(self._window.popleft())
            self._base += 1
            if self._base not in self._acknowledged:
                break
            self._acknowledged.discard(self._base)
        self._wake()

    def refuse(self, reason: str) -> None:
        """Take a refusal: the log has not stored an event; `Publisher.watch` goes back soon."""
        self._reason = reason
        self._repeats = 0
        LOG_REFUSALS.inc()

    def go_back(self, now: float) -> None:
        """Send everything from the first unacknowledged event on again."""
        if self._stuck_since is None:
            self._stuck_since = self.progress_at
        self.progress_at = now
        if now - self._stuck_since > self._publisher.give_up or self.lease.is_lost:
            self._wake()
            return
        if not self._may_send():
            return
        PUBLISH_REPEATS.inc(len(self._window))
        self._acknowledged.clear()
        self._run += 1
        self._repeats += 1
        self._reply = f"{self._publisher.inbox}.{self._name}.{self._run}."
        for offset, data in enumerate(list(self._window)):
            self._send(self._base + offset, data)

    def _send(self, number: int, data: bytes) -> None:
        try:
            self._broker.send(self._subject, data, self._reply + str(number))
        except BrokerUnavailable as error:
            self._reason = str(error)

    async def _progress(self) -> None:
        now = self._loop.time()
        if self._stuck_since is not None and now - self._stuck_since > self._publisher.give_up:
            raise LogUnavailable(len(self._window), now - self._stuck_since, self._reason)
        self._check_lost()
        self._room = self._loop.create_future()
        try:
            await self._room
        finally:
            self._room = None

    def _wake(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
