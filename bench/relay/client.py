"""A client process: opens its streams, compares every text with what the provider sends, and measures latencies.

Run as ``python -m bench.relay.client PLAN`` with a `bench.relay.scenarios.Plan` as JSON. It writes the file ``ready``
when all its streams are open; at the end ``result`` and the latencies (native 64-bit nanoseconds).
"""

import asyncio
import gc
import signal
import sys
from array import array
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from bench.relay.readers import Expected, Harvest, Reader, native, openai
from bench.relay.scenarios import Plan, StreamOrder
from bench.stamps import Stamps
from bench.stats import ClientResult
from bench.wire import MalformedResponse, Response, request

__all__ = ["finish", "main", "read_plan"]

OPENING: Final = 32
LINGER: Final = 120
REOPENINGS: Final = 5


class _Posted(msgspec.Struct):
    generation: str


class Client:
    """All streams of this process."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.harvest = Harvest()
        self._authority = f"{plan.host}:{plan.port}"  # without credentials delivery accepts only its own host name
        self._stamps = Stamps(Path(plan.stamps))
        self._gate = asyncio.Semaphore(OPENING)
        self._unopened = plan.generations
        self._opened = asyncio.Event()

    async def run(self) -> None:
        """Read every stream to its end, or until the deadline."""
        gc.disable()  # a garbage collection here would count as latency of the pipeline; runs are short
        try:
            async with asyncio.timeout(self.plan.deadline), asyncio.TaskGroup() as group:
                for order in self.plan.orders():
                    group.create_task(self._stream(order))
                await self._opened.wait()
                Path(self.plan.ready).touch()
        except TimeoutError:
            self.harvest.problem(f"not finished within {self.plan.deadline:.0f} s")

    async def _stream(self, order: StreamOrder) -> None:
        expected = Expected(order, self._stamps.cells)
        open_ = self._subscribe if self.plan.kind == "tailrace" else self._ask
        readers: list[Reader] = []
        try:
            async with self._gate:
                readers = await open_(order, expected)
        except (OSError, MalformedResponse, msgspec.DecodeError) as error:
            self.harvest.problem(f"stream {order.stream}: cannot be opened: {error!r}")
        self._unopened -= 1
        if not self._unopened:
            self._opened.set()
        await asyncio.gather(*(self._finish(order, reader) for reader in readers))

    def _body(self, order: StreamOrder) -> dict[str, object]:
        text = msgspec.json.encode(order).decode()
        return {"model": self.plan.model, "messages": [{"role": "user", "content": text}]}

    async def _ask(self, order: StreamOrder, expected: Expected) -> list[Reader]:
        body = {**self._body(order), "stream": True}
        call = request("POST", "/v1/chat/completions", self._authority, self.plan.headers, msgspec.json.encode(body))
        return [await self._open(Reader(expected, self.harvest, openai, call))]

    async def _subscribe(self, order: StreamOrder, expected: Expected) -> list[Reader]:
        session = f"{self.plan.run}-{order.stream}"
        generation = await self._post(session, msgspec.json.encode(self._body(order)))
        path = f"/v1/sessions/{session}/events?generation={generation}"
        call = request("GET", path, self._authority, self.plan.headers)
        readers = [Reader(expected, self.harvest, native, call) for _ in range(self.plan.subscribers)]
        for reader in readers:
            await self._open(reader)
            await reader.headed.wait()
        return readers

    async def _post(self, session: str, body: bytes) -> str:
        reader, writer = await asyncio.open_connection(self.plan.host, self.plan.port)
        headers = {"connection": "close", **self.plan.headers}
        writer.write(request("POST", f"/v1/sessions/{session}/generations", self._authority, headers, body))
        response = Response()
        while not response.ended and (data := await reader.read(65_536)):
            response.feed(data)
        writer.close()
        if response.status != 202:
            raise ConnectionError(f"asking for a generation: {response.status} {response.tail[:300]!r}")
        return msgspec.json.decode(response.tail, type=_Posted).generation

    async def _open(self, reader: Reader) -> Reader:
        await asyncio.get_running_loop().create_connection(lambda: reader, self.plan.host, self.plan.port)
        return reader

    async def _finish(self, order: StreamOrder, reader: Reader) -> None:
        for _ in range(REOPENINGS):
            await reader.closed.wait()
            if reader.ended is not None or not reader.cursor:
                break
            reader = await self._open(reader.again(self.plan.headers))
            self.harvest.reconnects += 1
        self.harvest.finish(order, reader)

    def result(self) -> ClientResult:
        """Return the result so far."""
        h, plan = self.harvest, self.plan
        return ClientResult(
            streams=plan.generations * plan.subscribers,
            complete=h.complete,
            mismatches=h.mismatches,
            tokens=len(h.latencies),
            events=h.events,
            reads=h.reads,
            bytes=h.bytes,
            reconnects=h.reconnects,
            last_ns=h.last_ns,
            problems=h.problems,
        )


def read_plan() -> Plan:
    """Read the plan from the file named by this process's argument."""
    return msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Plan)


def finish(plan: Plan, result: ClientResult, latencies: "array[int]") -> None:
    """Write the result, and wait to be stopped: processor time and memory are read from outside until then."""
    with Path(plan.latencies).open("wb") as file:
        latencies.tofile(file)
    unfinished = Path(plan.result + ".part")
    unfinished.write_bytes(msgspec.json.encode(result))
    unfinished.rename(plan.result)
    signal.alarm(LINGER)
    signal.pause()


def main() -> None:
    """Read the plan, run, write the result."""
    plan = read_plan()

    async def run() -> Client:
        client = Client(plan)
        await client.run()
        return client

    client = uvloop.run(run())
    finish(plan, client.result(), client.harvest.latencies)


if __name__ == "__main__":
    main()
