"""Subscribers over gRPC: count messages by a mark; decode and compare a sample."""

import asyncio
import time
from array import array
from collections.abc import Callable
from typing import Final

import grpc

from bench.fanout.crowd import PROBLEMS, CrowdResult
from bench.fanout.events import TEXT_MARK, session, text
from bench.fanout.scenarios import Plan
from schemas.rpc.tailrace.v1 import tailrace_pb2 as rpc

__all__ = ["Calls"]

METHOD: Final = "/tailrace.v1.Delivery/Read"
CALLS_OF_A_CHANNEL: Final = 100
GRACE: Final = 0.3
_MARK: Final = TEXT_MARK.encode()


class Calls:
    """The calls of one plan, over as few connections as possible."""

    def __init__(self, plan: Plan, stamps: memoryview) -> None:
        self.plan = plan
        self.took: array[int] = array("q")
        self.problems: list[str] = []
        self._stamps = stamps
        self._counts = dict.fromkeys(range(plan.first, plan.stop), 0)
        self._wrong: set[int] = set()
        self._reads = self._bytes = self._last_ns = 0
        self._unopened = len(self._counts)
        self._unfinished = len(self._counts)
        self._opened = asyncio.Event()
        self._finished = asyncio.Event()

    async def run(self, ready: Callable[[], None]) -> None:
        """Read until every call has all its events plus a grace time, or until the plan's deadline."""
        calls = [self._open(number) for number in self._counts]
        tasks = [asyncio.create_task(self._read(*call)) for call in calls]
        try:
            async with asyncio.timeout(self.plan.deadline):
                await self._opened.wait()
                ready()
                await self._finished.wait()
            await asyncio.sleep(GRACE)
        except TimeoutError:
            self._problem(f"{self._unfinished} calls were not complete in time")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _open(self, number: int) -> tuple[int, grpc.aio.UnaryStreamCall[bytes, bytes]]:
        if (number - self.plan.first) % CALLS_OF_A_CHANNEL == 0:
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
            self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.plan.port}", options=options)
        request = rpc.ReadRequest(session=session(self.plan.base + number % self.plan.sessions))
        method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(METHOD)
        return number, method(request.SerializeToString())

    async def _read(self, number: int, call: grpc.aio.UnaryStreamCall[bytes, bytes]) -> None:
        opened = False
        try:
            async for data in call:
                now = time.monotonic_ns()
                if not opened:
                    opened = True
                    self._note_opened()
                self._take(number, data, now)
            self._problem("a call was ended by the server")
        except grpc.aio.AioRpcError as error:
            self._problem(f"{error.code().name}: {error.details()}")
        if not opened:
            self._note_opened()

    def _note_opened(self) -> None:
        self._unopened -= 1
        if not self._unopened:
            self._opened.set()

    def _take(self, number: int, data: bytes, now: int) -> None:
        self._reads += 1
        self._bytes += len(data)
        before, want = self._counts[number], self.plan.events
        sampled = number % self.plan.samples == 0
        count = self._compare(number, data, before, now) if sampled else data.count(_MARK)
        self._counts[number] = before + count
        if before < want <= before + count:
            self._last_ns = now
            self._unfinished -= 1
            if not self._unfinished:
                self._finished.set()

    def _compare(self, number: int, data: bytes, seen: int, now: int) -> int:
        plan = self.plan
        cells = number % plan.sessions * plan.events
        count = 0
        for frame in rpc.ReadResponse.FromString(data).frames:
            if frame.event.type != "delta":
                continue
            index = seen + count
            wanted = text(plan.base + number % plan.sessions, index)
            if frame.event.seq != index + 1 or frame.event.delta.text != wanted:
                self._wrong.add(number)
            elif index < plan.events and (stamp := self._stamps[cells + index]):
                self.took.append(now - stamp)
            count += 1
        return count

    def _problem(self, what: str) -> None:
        if len(self.problems) < PROBLEMS:
            self.problems.append(what)

    def result(self) -> CrowdResult:
        """Return the result so far."""
        want, counts = self.plan.events, self._counts.values()
        return CrowdResult(
            streams=len(counts),
            complete=sum(count == want for count in counts),
            events=sum(counts),
            missing=sum(max(0, want - count) for count in counts),
            surplus=sum(max(0, count - want) for count in counts),
            mismatches=len(self._wrong),
            reads=self._reads,
            bytes=self._bytes,
            last_ns=self._last_ns,
            returns=0,
            resumed_ms=[],
            problems=self.problems,
        )
