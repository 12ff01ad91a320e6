"""Kill billing at random while a log is written; then compare its amounts with a count over that log."""

import asyncio
import random
import time
from collections import Counter
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Final

import aiohttp
import msgspec

from bench.chaos.bills import check_bills
from bench.chaos.clients import Client
from bench.chaos.credentials import Credentials
from bench.chaos.database import Found, read_database
from bench.chaos.evidence import Evidence
from bench.chaos.history import AnyRecord, Billed, Exported, Logged, Opened, Said
from bench.chaos.kills_log import messages, name_of
from bench.chaos.log import read_log
from bench.chaos.money import PRICES, check_money
from bench.chaos.pace import slow_for
from bench.chaos.schedule import BILLINGS, Export, Schedule
from bench.chaos.stage import PARTITIONS, Member, clean_environment
from bench.chaos.violation import Violation
from bench.processes import Died, Processes, fetch, free_port, python
from bench.relay.targets import start_nats
from schemas.topology import Topology, token_stream
from services.kit.jetstream.broker import Broker

__all__ = ["Kills", "Outcome"]

READY_SECONDS: Final = 60.0
END_SECONDS: Final = 60.0
ACKNOWLEDGED: Final = 200
"""Bound of unacknowledged messages: beyond 10,000 the broker drops some."""
EXPORTED: Final = 100
"""One of this many generations is exported."""
WHILE_WORKING: Final = 0.8
_SETTINGS: Final = {
    "TAILRACE_PARTITIONS": str(PARTITIONS),
    "TAILRACE_LOG_FORMAT": "json",
    "TAILRACE_BILLING_INTERVAL": "0.1",
    "TAILRACE_BILLING_BATCH": "200",
    "TAILRACE_BILLING_HOLD": "1",
    "TAILRACE_BILLING_GRACE": "1",
}


class Outcome(msgspec.Struct, kw_only=True):
    """Result of one run. ``messages``: in the log; ``events``: accepted ones. ``amount`` and ``tokens``: of budgets.

    ``kills``: of billing processes; ``ended``: number that ended by themselves. ``refused``: responses to exports.
    """

    seed: int
    generations: int
    messages: int
    events: int
    kills: int
    ended: int
    exports: int
    refused: list[str] = []
    entries: int
    amount: str
    tokens: int
    statuses: dict[str, int]
    seconds: float
    violations: list[Violation]


class Kills:
    """One run in a folder. ``seconds``: duration of writing the log and killing processes."""

    def __init__(self, folder: Path, seed: int, generations: int, seconds: float) -> None:
        self.seed = seed
        self.generations = generations
        self.seconds = seconds
        self.database = folder / "billing.db"
        self._folder = folder
        self._ports = {name: free_port() for name in BILLINGS}
        self._records: list[AnyRecord] = []
        self._kills = 0
        self._ended = 0

    def execute(self) -> Outcome:
        """Run it.

        Raises:
            Died: broker or billing do not start.
            TooLate: the broker does not get ready.
        """
        with Processes(self._folder, clean_environment()) as processes:
            port = free_port()
            start_nats(processes, port)
            return asyncio.run(self._run(f"nats://127.0.0.1:{port}"))

    async def _run(self, nats: str) -> Outcome:
        begun = time.monotonic()
        members = [self._member(name, nats) for name in BILLINGS]
        async with Broker.connect(nats, "kills") as broker, aiohttp.ClientSession(trust_env=False) as http:
            await broker.apply(Topology(partitions=PARTITIONS))
            try:
                for member in members:
                    member.start()
                await asyncio.gather(*(self._ready(member) for member in members))
                watch = asyncio.create_task(self._watch(members))
                try:
                    await self._break(broker, members, self._client(http))
                    found = await self._booked(broker)
                finally:
                    watch.cancel()
            finally:
                for member in members:
                    member.kill()
            logged = await read_log(broker)
        return self._outcome(logged, found, time.monotonic() - begun)

    def _member(self, name: str, nats: str) -> Member:
        prices = self._folder / "prices.csv"
        prices.write_text(PRICES)
        env = _SETTINGS | {
            "TAILRACE_NATS_URL": nats,
            "TAILRACE_BILLING_DATABASE_URL": f"sqlite:///{self.database}",
            "TAILRACE_BILLING_PRICES": str(prices),
            "TAILRACE_BILLING_PORT": str(self._ports[name]),
        }
        return Member(name, python("services.billing"), clean_environment() | env, self._folder)

    async def _watch(self, members: list[Member]) -> None:
        """Restart processes that end by themselves, as a supervisor does."""
        while True:
            await asyncio.sleep(0.5)
            for member in members:
                if member.wanted and member.process is not None and member.process.code is not None:
                    self._ended += 1
                    member.start()

    def _client(self, http: aiohttp.ClientSession) -> Client:
        billings = [f"http://127.0.0.1:{port}" for port in self._ports.values()]
        return Client(http, [], self._records.append, Credentials(self._folder, None), billings=billings)

    async def _ready(self, member: Member) -> None:
        url = f"http://127.0.0.1:{self._ports[member.name]}/readyz"
        try:
            async with asyncio.timeout(slow_for(READY_SECONDS)):
                while await asyncio.to_thread(fetch, url, timeout=2) is None:  # noqa: ASYNC110  # another process
                    await asyncio.sleep(0.1)
        except TimeoutError as error:
            raise Died(f"{member.name} does not get ready") from error

    async def _any_ready(self, members: list[Member]) -> None:
        waiting = [asyncio.create_task(self._ready(member)) for member in members]
        try:
            for first in asyncio.as_completed(waiting):
                return await first
        finally:
            for task in waiting:
                task.cancel()

    async def _break(self, broker: Broker, members: list[Member], client: Client) -> None:
        written = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write(broker, written))
            group.create_task(self._export(client))
            group.create_task(self._kill(members, written))

    async def _write(self, broker: Broker, written: asyncio.Event) -> None:
        """Append the log, spread over the run's time."""
        all_of_it = list(messages(self.seed, self.generations, PARTITIONS))
        begun = time.monotonic()
        for number, (subject, data) in enumerate(all_of_it, 1):
            if number % ACKNOWLEDGED and number != len(all_of_it):
                await broker.publish(subject, data)
                continue
            await broker.publish_stored(subject, data)
            await asyncio.sleep(max(0.0, begun + self.seconds * number / len(all_of_it) - time.monotonic()))
        written.set()

    async def _export(self, client: Client) -> None:
        """Send exports of generations that may not be stored yet, some of them twice."""
        rng = random.Random(f"{self.seed}: exports")
        count = max(1, self.generations // EXPORTED)
        for number in sorted(rng.sample(range(self.generations), count)):
            export = Export(at=0.0, ask=number, input=rng.randint(0, 500), output=rng.randint(0, 500))
            for _ in range(rng.choice((1, 1, 2))):
                await client.export(export, name_of(number))
            await asyncio.sleep(self.seconds / (2 * count))

    async def _kill(self, members: list[Member], written: asyncio.Event) -> None:
        """Send SIGKILL to one or both repeatedly at random times, usually while one of them works."""
        rng = random.Random(f"{self.seed}: kills")
        while not written.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(rng.uniform(0.1, 4.0)):
                    await written.wait()
            if rng.random() < WHILE_WORKING:
                await self._any_ready(members)
                await asyncio.sleep(rng.uniform(0.0, 1.5))
            victims = members if rng.random() < 0.25 else [rng.choice(members)]
            for victim in victims:
                victim.kill()
                self._kills += 1
            await asyncio.sleep(rng.uniform(0.0, 1.0))
            for victim in victims:
                victim.start()

    async def _booked(self, broker: Broker) -> Found:
        """Return the database's content once it covers the whole log, or after a time limit."""
        deadline = time.monotonic() + slow_for(END_SECONDS)
        last = {p: (await broker.state(token_stream(p))).last_seq for p in range(PARTITIONS)}
        while True:
            found = await asyncio.to_thread(read_database, self.database)
            read = all(found.applied.get(partition, 0) == seq for partition, seq in last.items())
            if (read and found.settled) or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.3)

    def _outcome(self, logged: list[Logged], found: Found, seconds: float) -> Outcome:
        schedule = Schedule(seed=self.seed, seconds=self.seconds, nodes=1, asks=(), watches=(), cancels=(), faults=())
        billed = [Billed(row=row) for row in found.rows]
        opened = Opened(schedule=schedule, wall=0.0, lease=0.0)
        evidence = Evidence.of([opened, *self._records, *logged, *billed, found.amounts])
        spending = found.amounts.spending
        return Outcome(
            seed=self.seed,
            generations=len(evidence.told),
            messages=len(logged),
            events=sum(len(told.accepted) for told in evidence.told.values()),
            kills=self._kills,
            ended=self._ended,
            exports=sum(isinstance(record, Exported) for record in self._records),
            refused=[record.data for record in self._records if isinstance(record, Said)],
            entries=len(found.amounts.entries),
            amount=str(sum((Decimal(row["amount"]) for row in spending), Decimal(0))),
            tokens=sum(row["tokens"] for row in spending),
            statuses=dict(Counter(row["status"] for row in found.rows)),
            seconds=round(seconds, 1),
            violations=[*check_bills(evidence), *check_money(evidence)],
        )
