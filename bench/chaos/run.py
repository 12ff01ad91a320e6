"""Run a schedule against real processes and write its history."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import aiohttp

from bench.chaos.clients import Accepted, Client
from bench.chaos.credentials import Credentials
from bench.chaos.database import read_database
from bench.chaos.history import (
    AnyRecord,
    Billed,
    Healed,
    History,
    Hit,
    Logged,
    Opened,
    Quiet,
    read_history,
)
from bench.chaos.log import read_log, waiting
from bench.chaos.pace import slow_for, slowness
from bench.chaos.schedule import (
    BILLINGS,
    DELIVERIES,
    LEASE,
    SERVICES,
    Ask,
    Cancel,
    Export,
    Fault,
    Schedule,
    Watch,
    Worker,
)
from bench.chaos.stage import MEMORY_BOUND, Stage
from bench.chaos.subscribers import Subscriber
from bench.chaos.told import tell
from bench.chaos.workers import ConsumerWorker, create_consumer
from bench.processes import Died
from services.kit.jetstream.broker import Broker, BrokerUnavailable

__all__ = ["Run"]

END_SECONDS: Final = 45.0
READERS_SECONDS: Final = 20.0
WORKERS_SECONDS: Final = 30.0
BILLING_SECONDS: Final = 25.0
BUDGET: Final = 1_000_000_000
"""Tokens per month: too many to refuse a request, so that every generation is reserved and settled."""
SLOW_SECONDS: Final = 0.15


class Run:
    """One run of a schedule in a separate folder.

    ``planted``: a bug to start the services with. ``patience``: seconds after the last fault until all must have ended,
    on a quiet machine.

    Raises:
        Died: the folder exists, or there are no ports.
    """

    def __init__(self, schedule: Schedule, folder: Path, planted: str = "", patience: float = END_SECONDS) -> None:
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            raise Died(f"{folder} exists already: a run needs a new folder") from error
        self.schedule = schedule
        self.history = History(folder / "history.jsonl")
        self.credentials = Credentials(folder, schedule.tokens)
        self.stage = Stage(folder, schedule.nodes, self.credentials, planted)
        self._planted = planted
        self._patience = patience
        self._begun = time.monotonic()
        self._accepted: dict[int, asyncio.Future[Accepted | None]] = {}
        self._subscribers: list[Subscriber] = []
        self._reading: list[asyncio.Task[None]] = []
        self._working: list[asyncio.Task[None]] = []
        self._worked = asyncio.Event()

    def _add(self, record: AnyRecord) -> None:
        record.t = round(time.monotonic() - self._begun, 4)
        self.history.add(record)

    async def execute(self) -> list[AnyRecord]:
        """Run it and return the history.

        Raises:
            Died: the processes do not get ready.
        """
        try:
            async with self.stage, Broker.connect(self.stage.nats_url, "chaos") as broker:
                self._begun = time.monotonic()
                self._add(
                    Opened(
                        schedule=self.schedule,
                        wall=time.time(),
                        lease=LEASE,
                        memory=MEMORY_BOUND,
                        planted=self._planted,
                    )
                )
                watch = asyncio.create_task(self.stage.watch(self._add))
                try:
                    await self._play()
                    self._add(Quiet(slowness=slowness()))
                    await self._settle(broker)
                finally:
                    watch.cancel()
                    await asyncio.gather(watch, *self._reading, *self._working, return_exceptions=True)
                for record in await self.stage.stop():
                    self._add(record)
            if self.stage.sent.exists():
                for record in read_history(self.stage.sent):
                    self.history.add(record)
            return self.history.records
        finally:
            self.history.close()

    async def _play(self) -> None:
        loop = asyncio.get_running_loop()
        self._accepted = {index: loop.create_future() for index in range(len(self.schedule.asks))}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=3)
        http = aiohttp.ClientSession(
            timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20, trust_env=False
        )
        self._http = http
        client = Client(
            http,
            [f"http://127.0.0.1:{self.stage.ports[name]}" for name in DELIVERIES],
            self._add,
            self.credentials,
            [f"127.0.0.1:{self.stage.call_ports[name]}" for name in DELIVERIES],
            [f"http://127.0.0.1:{self.stage.ports[name]}" for name in BILLINGS],
        )
        await client.set_budget(BUDGET)
        consumers = sorted({worker.consumer for worker in self.schedule.workers})
        await asyncio.gather(*(create_consumer(client, name) for name in consumers))
        self._begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for index, ask in enumerate(self.schedule.asks):
                group.create_task(self._at(ask.at, self._ask, client, index, ask))
            for number, watch in enumerate(self.schedule.watches):
                group.create_task(self._at(watch.at, self._watch, client, number, watch))
            for number, worker in enumerate(self.schedule.workers):
                group.create_task(self._at(worker.at, self._work, client, number, worker))
            for export in self.schedule.exports:
                group.create_task(self._at(export.at, self._export, client, export))
            for cancel in self.schedule.cancels:
                group.create_task(self._at(cancel.at, self._cancel, client, cancel))
            for fault in self.schedule.faults:
                group.create_task(self._at(fault.at, self._break, fault))
            group.create_task(asyncio.sleep(self.schedule.seconds))

    async def _at(self, at: float, act: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        await asyncio.sleep(max(0.0, at - (time.monotonic() - self._begun)))
        await act(*arguments)

    async def _ask(self, client: Client, index: int, ask: Ask) -> None:
        self._accepted[index].set_result(await client.ask(index, ask))

    async def _watch(self, client: Client, number: int, watch: Watch) -> None:
        accepted = await self._accepted[watch.ask]
        if accepted is not None:
            subscriber = Subscriber(number, watch, accepted, client)
            self._subscribers.append(subscriber)
            self._reading.append(asyncio.create_task(subscriber.run()))

    async def _work(self, client: Client, number: int, worker: Worker) -> None:
        work = ConsumerWorker(number, worker, client)
        self._working.append(asyncio.create_task(work.run(self._worked)))

    async def _export(self, client: Client, export: Export) -> None:
        accepted = await self._accepted[export.ask]
        if accepted is not None:
            await client.export(export, accepted.generation)

    async def _cancel(self, client: Client, cancel: Cancel) -> None:
        accepted = await self._accepted[cancel.ask]
        if accepted is not None:
            await client.cancel(cancel, accepted.session, accepted.generation)

    async def _break(self, fault: Fault) -> None:
        self._add(Hit(fault=fault))
        until = time.monotonic() + fault.seconds
        members = self.stage.targets(fault.target)
        links = self.stage.links.get(fault.target, [])
        links = links if fault.node is None else [links[fault.node]]
        match fault.kind:
            case "kill" | "outage":
                for member in members:
                    member.kill()
            case "pause":
                members[0].pause()
            case "drain":
                if (exited := await members[0].stop()) is not None and fault.target in SERVICES:
                    self._add(exited)
            case "roll":
                for exited in await self.stage.roll(fault.target):
                    self._add(exited)
            case "cut":
                for link in links:
                    link.cut()
            case "hold":
                for link in links:
                    link.hold()
            case "slow":
                for link in links:
                    link.slow(SLOW_SECONDS)
        await asyncio.sleep(max(0.0, until - time.monotonic()))
        for link in links:
            link.heal()
        for member in members:
            member.resume()
            if not member.wanted:
                member.start()
        self._add(Healed(number=fault.number))

    async def _settle(self, broker: Broker) -> None:
        """Wait, with time limits, until all generations are ended, read and booked; record the final state."""
        try:
            logged = await self._ended(broker)
            sessions: dict[str, int] = {}
            for told in tell(logged).values():
                for entry in told.accepted:
                    sessions[told.session] = max(sessions.get(told.session, 0), entry.seq)
            for subscriber in self._subscribers:
                subscriber.finish(sessions.get(subscriber.session, 0))
            if self._reading:
                await asyncio.wait(self._reading, timeout=slow_for(min(READERS_SECONDS, self._patience)))
            self._worked.set()
            if self._working:
                await asyncio.wait(self._working, timeout=slow_for(min(WORKERS_SECONDS, self._patience)))
            for task in (*self._reading, *self._working):
                task.cancel()
            await asyncio.gather(*self._reading, *self._working, return_exceptions=True)
        finally:
            await self._http.close()
        for record in await self._booked(broker):
            self._add(record)

    async def _ended(self, broker: Broker) -> list[Logged]:
        """Return the log once the queue is empty and every generation has ended."""
        deadline = time.monotonic() + slow_for(self._patience)
        logged: list[Logged] = []
        while time.monotonic() < deadline:
            try:
                queued = await waiting(broker)
                logged = await read_log(broker)
            except BrokerUnavailable:
                await asyncio.sleep(0.5)
                continue
            told = tell(logged)
            posted = [f.result() for f in self._accepted.values() if f.done()]
            known = all(a is None or a.generation in told for a in posted)
            if queued == 0 and known and all(t.terminals for t in told.values()):
                return logged
            await asyncio.sleep(0.5)
        return logged

    async def _booked(self, broker: Broker) -> list[AnyRecord]:
        """Return the log and billing's rows once billing has booked the whole log, or after a time limit.

        Raises:
            Died: the log cannot be read.
        """
        deadline = time.monotonic() + slow_for(BILLING_SECONDS)
        while True:
            late = time.monotonic() > deadline
            try:
                logged = await read_log(broker)
                found = await asyncio.to_thread(read_database, self.stage.database)
                last = {m.partition: m.seq for m in logged}
                if late or (found.settled and all(found.applied.get(p, 0) == seq for p, seq in last.items())):
                    return [*logged, *(Billed(row=row) for row in found.rows), found.amounts]
            except BrokerUnavailable as error:
                if late:
                    raise Died(f"the log cannot be read in the end: {error}") from error
            await asyncio.sleep(0.3)
