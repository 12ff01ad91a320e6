"""A client process of the open loop: starts answers at their times, reads, drops, resumes and cancels.

Run as ``python -m bench.relay.open_client PLAN`` with a `bench.relay.arrivals.OpenPlan` as JSON.
"""

import asyncio
import gc
import signal
import sys
import time
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from bench.relay.arrivals import OpenPlan, Start
from bench.relay.readers import Expected, Harvest, Parser, Reader, native, openai
from bench.stamps import Stamps
from bench.wire import MalformedResponse, Response, request

__all__ = ["OpenResult", "main"]

LINGER: Final = 120
REOPENINGS: Final = 20
POLL: Final = 0.01


class OpenResult(msgspec.Struct, kw_only=True):
    """What one client process saw. Times in nanoseconds.

    ``first``: from the time a start was due to its first token, in the order of the starts; those that got none are in
    ``failed``. ``gaps``: from the provider's write of a token to its arrival, for each token that came while its client
    was connected. ``resumed``: from a reconnection to its first event. ``opened_ns``, ``ended_ns``: monotonic times of
    the first start and of the last token.
    """

    starts: int = 0
    complete: int = 0
    cancelled: int = 0
    failed: int = 0
    resumes: int = 0
    mismatches: int = 0
    tokens: int = 0
    first: list[int] = []
    gaps: list[int] = []
    resumed: list[int] = []
    opened_ns: int = 0
    ended_ns: int = 0
    problems: list[str] = []


class _Posted(msgspec.Struct):
    generation: str


class OpenReader(Reader):
    """One connection that also measures the first token, and leaves or cancels after a number of tokens."""

    def __init__(self, expected: Expected, harvest: Harvest, parse: Parser, call: bytes, leave_at: int = 0) -> None:
        super().__init__(expected, harvest, parse, call)
        self.first_ns = 0
        self.since_ns = 0
        self.leave_at = leave_at
        self.reached = asyncio.Event()

    def follow(self, headers: dict[str, str]) -> "OpenReader":
        """Return a reader that continues behind this one's last event."""
        line, _, rest = self._call.partition(b"\r\n")
        call = line + b"\r\nlast-event-id: " + self.cursor + b"\r\n" + rest
        reader = OpenReader(self.expected, self.harvest, self._parse, call)
        reader.position, reader.token, reader.differs = self.position, self.token, self.differs
        reader.since_ns = time.monotonic_ns()
        reader.cursor = self.cursor
        return reader

    def leave(self) -> None:
        """Drop the connection without a word."""
        self._transport.abort()

    def _take(self, text: str, now: int) -> None:
        if not self.first_ns:
            self.first_ns = now
        stamps, since, before = self.expected.stamps, self.since_ns, len(self.harvest.latencies)
        token = self.token
        super()._take(text, now)
        # Tokens that the provider sent while the client was away say nothing about the pipeline.
        if since and any(stamps[index] < since for index in range(token, self.token)):
            kept = [now - stamps[index] for index in range(token, self.token) if stamps[index] >= since]
            del self.harvest.latencies[before:]
            self.harvest.latencies.extend(kept)
        if self.leave_at and self.token >= self.leave_at:
            self.reached.set()


class OpenClient:
    """All starts of this process."""

    def __init__(self, plan: OpenPlan) -> None:
        self.plan = plan
        self.harvest = Harvest()
        self.result = OpenResult()
        self._authority = f"{plan.host}:{plan.port}"
        self._stamps = Stamps(Path(plan.stamps))
        self._begin_ns = 0

    async def run(self) -> None:
        """Wait for the begin, start every answer, and read all to their ends or the deadline."""
        gc.freeze()
        gc.disable()  # a collector's pause here would be taken for latency of the pipeline; runs are short
        Path(self.plan.ready).touch()
        go = Path(self.plan.go)
        while not go.exists():  # noqa: ASYNC110  # made by another process
            await asyncio.sleep(POLL)
        self._begin_ns = int(go.read_text())
        self.result.opened_ns = self._begin_ns
        try:
            async with asyncio.timeout(self.plan.deadline):
                await (self._closed_loop() if self.plan.workers else self._open_loop())
        except TimeoutError:
            self.harvest.problem(f"not finished within {self.plan.deadline:.0f} s")

    async def _open_loop(self) -> None:
        async with asyncio.TaskGroup() as group:
            for start in self.plan.starts:
                due = self._begin_ns + int(start.at * 1e9)
                if (wait := (due - time.monotonic_ns()) / 1e9) > 0:
                    await asyncio.sleep(wait)
                group.create_task(self._answer(start, due))

    async def _closed_loop(self) -> None:
        queue = iter(self.plan.starts)
        stop = self._begin_ns + int(self.plan.seconds * 1e9)

        async def work() -> None:
            for start in queue:
                if time.monotonic_ns() > stop:
                    return
                await self._answer(start, time.monotonic_ns())

        async with asyncio.TaskGroup() as group:
            for _ in range(self.plan.workers):
                group.create_task(work())

    async def _answer(self, start: Start, due: int) -> None:
        result = self.result
        result.starts += 1
        try:
            await self._read(start, due)
        except (OSError, MalformedResponse, msgspec.DecodeError) as error:
            result.failed += 1
            self.harvest.problem(f"start {start.order.stream}: {error!r}")

    async def _read(self, start: Start, due: int) -> None:
        plan, order = self.plan, start.order
        expected = Expected(order, self._stamps.cells)
        body: dict[str, object] = {
            "model": plan.model,
            "messages": [{"role": "user", "content": msgspec.json.encode(order).decode()}],
        }
        cancels = start.cancel_at
        drops = start.drop_at if plan.resumes else 0
        if plan.kind == "tailrace":
            session = f"{plan.run}-{order.stream}"
            path = f"/v1/sessions/{session}/generations"
            answer = await self._post(path, msgspec.json.encode(body))
            generation = msgspec.json.decode(answer, type=_Posted).generation
            call = request(
                "GET", f"/v1/sessions/{session}/events?generation={generation}", self._authority, plan.headers
            )
            reader = await self._open(OpenReader(expected, self.harvest, native, call, drops or cancels))
        else:
            path = ""
            data = msgspec.json.encode({**body, "stream": True})
            call = request("POST", "/v1/chat/completions", self._authority, plan.headers, data)
            reader = await self._open(OpenReader(expected, self.harvest, openai, call, drops or cancels))
        first = reader
        if drops or cancels:
            await self._until(reader)
            if drops and reader.ended is None:
                reader = await self._drop(reader, start)
            elif cancels and reader.ended is None:
                if path:
                    await self._post(f"{path}/{generation}/cancel", b"{}")
                else:
                    reader.leave()
        await self._finish(start, reader, cancelled=bool(cancels))
        if first.first_ns:
            self.result.first.append(first.first_ns - due)
        else:
            self.result.failed += 1
            self.harvest.problem(f"start {order.stream}: no token; status {first.response.status}")

    async def _until(self, reader: OpenReader) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (reader.reached, reader.closed)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _drop(self, reader: OpenReader, start: Start) -> OpenReader:
        reader.leave()
        await asyncio.sleep(start.away)
        again = reader.follow(self.plan.headers)
        began = time.monotonic_ns()
        self.result.resumes += 1
        await self._open(again)
        waits = [asyncio.ensure_future(event.wait()) for event in (again.headed, again.closed)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self.result.resumed.append(time.monotonic_ns() - began)
        return again

    async def _finish(self, start: Start, reader: OpenReader, *, cancelled: bool) -> None:
        for _ in range(REOPENINGS):
            await reader.closed.wait()
            if reader.ended is not None or not reader.cursor or cancelled:
                break
            self.harvest.reconnects += 1
            reader = await self._open(reader.follow(self.plan.headers))
        if cancelled and not reader.differs and (reader.ended or "cancelled").startswith(("cancelled", "completed")):
            self.result.cancelled += 1
            return
        self.harvest.finish(start.order, reader)

    async def _post(self, path: str, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self.plan.host, self.plan.port)
        headers = {"connection": "close", **self.plan.headers}
        writer.write(request("POST", path, self._authority, headers, body))
        response = Response()
        while not response.ended and (data := await reader.read(65_536)):
            response.feed(data)
        writer.close()
        if response.status not in (200, 202):
            raise ConnectionError(f"{path.rpartition('/')[2]}: {response.status} {response.tail[:300]!r}")
        return response.tail

    async def _open(self, reader: OpenReader) -> OpenReader:
        await asyncio.get_running_loop().create_connection(lambda: reader, self.plan.host, self.plan.port)
        return reader

    def finished(self) -> OpenResult:
        """Return what was seen."""
        h, result = self.harvest, self.result
        result.complete, result.mismatches, result.problems = h.complete, h.mismatches, h.problems
        result.gaps, result.tokens, result.ended_ns = h.latencies.tolist(), len(h.latencies), h.last_ns
        return result


def main() -> None:
    """Read the plan, run, write the result, and wait to be stopped."""
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=OpenPlan)

    async def run() -> OpenResult:
        client = OpenClient(plan)
        await client.run()
        return client.finished()

    result = uvloop.run(run())
    unfinished = Path(plan.result + ".part")
    unfinished.write_bytes(msgspec.json.encode(result))
    unfinished.rename(plan.result)
    signal.alarm(LINGER)
    signal.pause()


if __name__ == "__main__":
    main()
