"""Billing run in this process or as one of its own, against a real broker and a real database."""

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from bench.processes import free_port
from schemas.codec import encode_event
from schemas.events import Completed, Event, Failed
from schemas.subjects import Address, token_subject
from schemas.topology import Topology
from schemas.usage import Usage
from services.billing.adapters.database import migrate, open_engine
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.prices import Prices
from services.billing.adapters.reports import Reports
from services.billing.adapters.tail import Tail
from services.billing.consumer import Consumer
from services.billing.core.charging import Charging
from services.billing.core.reconciliation import Policy
from services.billing.database_url import database_url
from services.billing.terms import CurrentTerms
from services.kit.clock import SystemClock
from services.kit.jetstream.broker import Broker
from tests.conftest import eventually
from tests.support.billing_histories import history
from tests.support.migrated_database import copy_sqlite

INTERVAL = 0.05


class Run:
    """A running consumer, its ledger and its reports."""

    def __init__(self, consumer: Consumer, ledger: Ledger, reports: Reports) -> None:
        self.consumer = consumer
        self.ledger = ledger
        self.reports = reports


@asynccontextmanager
async def running(
    broker: Broker,
    url: str,
    *,
    holder: str = "test",
    batch: int = 100,
    policy: Policy | None = None,
    charging: Charging | None = None,
) -> AsyncIterator[Run]:
    """Run one consumer in this process until the block ends."""
    stop = asyncio.Event()
    async with open_engine(database_url(url)) as engine:
        await migrate(engine)
        ledger = Ledger(engine, holder, hold=1.0)
        tail = Tail(broker, Topology(), 0, batch=batch, interval=INTERVAL)
        consumer = Consumer(0, tail, ledger, CurrentTerms(Prices(engine), policy, charging), SystemClock())
        task = asyncio.create_task(consumer.run(stop))
        try:
            yield Run(consumer, ledger, Reports(engine))
        finally:
            stop.set()
            async with asyncio.timeout(20):
                await task


def sqlite(folder: Path) -> str:
    copy_sqlite(folder / "billing.db")
    return f"sqlite:///{folder}/billing.db"


class Scenario:
    """Many generations interleaved at random but repeatably, with the numbers that billing must come to."""

    def __init__(self, seed: int, generations: int = 40) -> None:
        chance = random.Random(seed)
        queues = []
        self.expected: dict[str, tuple[str, int, int | None]] = {}
        for number in range(generations):
            name = f"gen_{seed}_{number}"
            deltas = chance.randint(1, 30)
            kind = number % 4
            reported = Usage(input=7, output=10 * deltas + (50 if kind == 1 else 0)) if kind < 2 else None
            events = history(name, deltas=deltas, reported=reported, terminal=Failed if kind == 3 else Completed)
            status = ("matched", "drift", "provider_missing", "partial")[kind]
            self.expected[name] = (status, 10 * deltas, reported.output if reported else None)
            queues.append(self._with_repeats(events, chance))
        self.events: list[Event] = []
        while queues:
            queue = chance.choice(queues)
            self.events.append(queue.pop(0))
            if not queue:
                queues.remove(queue)

    @staticmethod
    def _with_repeats(events: Sequence[Event], chance: random.Random) -> list[Event]:
        written: list[Event] = []
        for end in range(1, len(events) + 1):
            written.append(events[end - 1])
            if chance.random() < 0.05:
                written += events[chance.randrange(end) : end]
        return written

    async def settled(self, reports: Reports) -> bool:
        return await self.found(reports) == self.expected

    async def found(self, reports: Reports) -> dict[str, tuple[str, int, int | None]]:
        found = {}
        for name in self.expected:
            g = await reports.generation("default", name)
            if g is not None:
                found[name] = (g.status, g.counted_output, g.output)
        return found


def place(generation: str) -> Address:
    return Address(0, "default", "s" + generation[-1], generation)


async def write(broker: Broker, events: Iterable[Event]) -> None:
    """Append events to the log and wait until it has them."""
    for event in events:
        await broker.publish(token_subject(place(event.generation)), encode_event(event))
    await broker.flush()


async def write_surely(broker: Broker, events: Iterable[Event]) -> None:
    """Append events one by one, again and again until the log has each."""
    for event in events:
        while True:
            try:
                await broker.publish_stored(token_subject(place(event.generation)), encode_event(event))
                break
            except Exception:  # the broker is away: a writer repeats until it is acknowledged
                await asyncio.sleep(0.05)


async def append_history(broker: Broker, generation: str) -> None:
    """Append a whole generation to the log."""
    await write_surely(broker, history(generation, reported=Usage(input=7, output=30)))


class Process:
    """``python -m services.billing`` as a process."""

    def __init__(self, nats_url: str, folder: Path, database: str, **settings: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"billing-{self.port}.log"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("TAILRACE_")} | {
            "TAILRACE_NATS_URL": nats_url,
            "TAILRACE_DATA": str(folder),
            "TAILRACE_BILLING_PORT": str(self.port),
            "TAILRACE_BILLING_DATABASE_URL": database,
            "TAILRACE_BILLING_INTERVAL": str(INTERVAL),
            "TAILRACE_BILLING_BATCH": "50",
            "TAILRACE_BILLING_HOLD": "1",
        }
        self.env |= {f"TAILRACE_BILLING_{name.upper()}": value for name, value in settings.items()}
        self.command = [sys.executable, "-m", "services.billing"]
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> "Process":
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(self.command, env=self.env, stderr=out)
        await eventually(self.ready, timeout=30, interval=0.05)
        return self

    async def get(self, path: str) -> httpx.Response | None:
        async with httpx.AsyncClient(base_url=self.url, timeout=5) as client:
            try:
                return await client.get(path)
            except httpx.TransportError:
                return None

    async def ready(self) -> bool:
        answer = await self.get("/readyz")
        return answer is not None and answer.status_code == 200

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    def stop(self) -> int:
        """Ask it to end and return its exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(20)
        self.process = None
        return code
