"""The publisher's process: write events to the log, or post the same bytes to a peer, and stamp each event.

Run as ``python -m bench.fanout.publisher ORDER`` with a `bench.fanout.scenarios.Order` as JSON.
"""

import asyncio
import gc
import signal
import sys
import time
from pathlib import Path
from typing import Final, Protocol

import msgspec
import uvloop

from bench.fanout.events import closing, event, generation, opening, session
from bench.fanout.scenarios import Order
from bench.stamps import Stamps
from bench.stats import percentile
from bench.wire import request
from schemas.subjects import Address, token_subject
from services.kit.jetstream.broker import Broker

__all__ = ["Published", "main"]

WINDOW: Final = 1_024
LINGER: Final = 300
LEAD_NS: Final = 50_000_000
TICK: Final = 0.001
BATCH: Final = 64
TENANT: Final = "default"


class Published(msgspec.Struct):
    """Events written after the signal, and their delay behind the schedule (paced scenarios)."""

    events: int
    late_p50_ms: float
    late_p99_ms: float
    refused: int


class Sink(Protocol):
    """A destination of events by session."""

    refused: int

    def put(self, number: int, data: bytes) -> None:
        """Send an event of session ``number``."""
        ...

    async def room(self, left: int = WINDOW) -> None:
        """Wait until at most ``left`` events are not acknowledged."""
        ...


class _Window:
    """Count the unacknowledged events."""

    def __init__(self) -> None:
        self.refused = 0
        self.under_way = 0
        self._waiter: asyncio.Future[None] | None = None
        self._left = 0

    def sent(self) -> None:
        self.under_way += 1

    def acknowledged(self, count: int) -> None:
        self.under_way -= count
        if self._waiter is not None and not self._waiter.done() and self.under_way <= self._left:
            self._waiter.set_result(None)

    async def room(self, left: int = WINDOW) -> None:
        """Wait until at most ``left`` events are not acknowledged."""
        while self.under_way > left:
            self._left, self._waiter = left // 2, asyncio.get_running_loop().create_future()
            await self._waiter


class LogSink(_Window):
    """Append to the log, pipelined."""

    def __init__(self, broker: Broker) -> None:
        super().__init__()
        self._broker = broker
        self._inbox = broker.client.new_inbox()
        self._subjects: dict[int, str] = {}

    async def start(self) -> None:
        """Subscribe to acknowledgements."""
        await self._broker.listen(self._inbox, self._receive)

    def put(self, number: int, data: bytes) -> None:
        """Send an event of session ``number``."""
        subject = self._subjects.get(number)
        if subject is None:
            subject = token_subject(Address(0, TENANT, session(number), generation(number)))
            self._subjects[number] = subject
        self.sent()
        self._broker.send(subject, data, self._inbox)

    def _receive(self, _subject: str, data: bytes, headers: bytes) -> None:
        if headers or b'"error"' in data:
            self.refused += 1
        self.acknowledged(1)


class PostSink(_Window, asyncio.Protocol):
    """Post to Nchan over one persistent connection, without waiting for each response."""

    def __init__(self) -> None:
        super().__init__()
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's is one

    def put(self, number: int, data: bytes) -> None:
        """Send an event of session ``number``."""
        self.sent()
        self._transport.write(request("POST", f"/publish?id={session(number)}", "bench", {}, data))

    def data_received(self, data: bytes) -> None:
        """Count the responses."""
        # The remainder of the previous read is one byte shorter than the pattern, so nothing is counted twice.
        self.refused += sum((self._rest[-9:] + data).count(line) for line in (b"HTTP/1.1 4", b"HTTP/1.1 5"))
        self.acknowledged((self._rest + data).count(b"HTTP/1.1 20"))
        self._rest = (self._rest + data)[-10:]

    def connection_lost(self, error: Exception | None) -> None:
        """Ignore the loss: no more acknowledgements arrive, so waiting calls fail at their deadline."""


async def _stamped(order: Order, sink: Sink, cells: memoryview) -> list[int]:
    """Publish all events after the history; return the delay of each in nanoseconds."""
    late: list[int] = []
    clock, wall = time.monotonic_ns, time.time
    begin = clock() + LEAD_NS
    interval = 1e9 / order.rate if order.rate else 0.0
    step = interval / order.sessions
    sent = 0
    for index in range(order.history, order.events):
        for number in range(order.sessions):
            if interval:
                due = begin + int((index - order.history) * interval + number * step)
                while (left := due - clock()) > 0:  # noqa: ASYNC110  # a schedule, not an event
                    await asyncio.sleep(max(left / 1e9, TICK))
                late.append(-left)
            now = clock()
            cells[number * order.events + index] = now
            sink.put(order.base + number, event(order.base + number, index, wall()))
            sent += 1
            if sent % BATCH == 0:
                if not interval:
                    await asyncio.sleep(0)
                await sink.room()
    return late


async def _history(order: Order, sink: Sink) -> None:
    for offset in range(order.sessions):
        number = order.base + offset
        if order.kind == "log":
            sink.put(number, opening(number, time.time()))
        for index in range(order.history):
            sink.put(number, event(number, index, time.time()))
            if index % BATCH == 0:
                await sink.room()
        await sink.room()


def _close(order: Order, sink: Sink) -> None:
    for offset in range(order.sessions):
        sink.put(order.base + offset, closing(order.base + offset, order.events, time.time()))


async def _publish(order: Order, sink: Sink) -> Published:
    stamps = Stamps(Path(order.stamps))
    gc.freeze()
    gc.disable()
    await _history(order, sink)
    if order.ends and order.history == order.events:
        _close(order, sink)
    await sink.room(0)
    Path(order.ready).touch()
    while not Path(order.go).exists():  # noqa: ASYNC110  # set by another process
        await asyncio.sleep(0.01)
    late = sorted(await _stamped(order, sink, stamps.cells))
    await sink.room(0)
    p50, p99 = (round(percentile(late, p) / 1e6, 3) for p in (50, 99))
    return Published((order.events - order.history) * order.sessions, p50, p99, sink.refused)


async def run(order: Order) -> Published:
    """Carry out an order."""
    async with asyncio.timeout(order.deadline):
        if order.kind == "nchan":
            loop = asyncio.get_running_loop()
            _, sink = await loop.create_connection(PostSink, "127.0.0.1", order.port)
            return await _publish(order, sink)
        async with Broker.connect(f"nats://127.0.0.1:{order.port}", "publisher", wait=5) as broker:
            log = LogSink(broker)
            await log.start()
            return await _publish(order, log)


def main() -> None:
    """Read the order, publish, write the result."""
    order = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Order)
    published = uvloop.run(run(order))
    unfinished = Path(order.result + ".part")
    unfinished.write_bytes(msgspec.json.encode(published))
    unfinished.rename(order.result)
    signal.alarm(LINGER)
    signal.pause()  # the parent reads this process's processor time before stopping it


if __name__ == "__main__":
    main()
