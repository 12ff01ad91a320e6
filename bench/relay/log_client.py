"""A client that bypasses delivery: queue requests for the producer directly, and read the log at the end.

So one producer process is measured with nothing but a provider and a broker beside it. Run as
``python -m bench.relay.log_client PLAN``, like `bench.relay.client`. The stream ends when producers have acknowledged
every request to the queue, which they do once the log has acknowledged all events.
"""

import asyncio
import time
from array import array
from pathlib import Path
from typing import Final

import msgspec

from bench.relay.client import finish, read_plan
from bench.relay.scenarios import Plan, StreamOrder
from bench.stats import ClientResult
from bench.text import boundaries, tokens
from schemas.acceptance import BEGINNING, Verdict, judge
from schemas.codec import decode_event
from schemas.events import Completed, Delta, type_of
from schemas.requests import Message, Request
from schemas.subjects import Address, lane_of, request_subject, token_subject
from schemas.topology import REQUESTS, token_stream
from services.kit.jetstream.broker import Broker, BrokerUnavailable

__all__ = ["LogClient", "main"]

TENANT: Final = "bench"
POLL: Final = 0.01
ASKING: Final = 32
PROBLEMS: Final = 10


class _Info(msgspec.Struct):
    class _State(msgspec.Struct):
        messages: int

    state: _State


class LogClient:
    """Request the streams of a plan, wait for their end, and then compare every text."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.result = ClientResult(
            streams=plan.generations,
            complete=0,
            mismatches=0,
            tokens=0,
            events=0,
            reads=0,
            bytes=0,
            reconnects=0,
            last_ns=0,
        )
        self._asking = asyncio.Semaphore(ASKING)

    async def run(self) -> None:
        """Request, wait and compare within the deadline."""
        plan = self.plan
        try:
            async with (
                asyncio.timeout(plan.deadline),
                Broker.connect(f"nats://{plan.host}:{plan.port}", "bench") as broker,
            ):
                await asyncio.gather(*(self._ask(broker, order) for order in plan.orders()))
                Path(plan.ready).touch()
                await _until_done(broker)
                self.result.last_ns = time.monotonic_ns()
                Path(plan.ended).touch()
                for order in plan.orders():
                    await self._compare(broker, order)
        except TimeoutError:
            self._problem(f"not finished within {plan.deadline:.0f} s")
        except BrokerUnavailable as error:
            self._problem(str(error))

    async def _ask(self, broker: Broker, order: StreamOrder) -> None:
        generation = self._name(order)
        request = Request(
            tenant=TENANT,
            session=generation,
            generation=generation,
            model=self.plan.model,
            messages=[Message(role="user", content=msgspec.json.encode(order).decode())],
            created_at=time.time(),
            partition=0,
        )
        async with self._asking:
            subject = request_subject(lane_of("default", request.priority), generation)
            await broker.publish_stored(subject, msgspec.json.encode(request))

    def _name(self, order: StreamOrder) -> str:
        return f"{self.plan.run}-{order.stream}"

    async def _compare(self, broker: Broker, order: StreamOrder) -> None:
        pieces, result = tokens(order.stream, order.tokens), self.result
        name, position, end = self._name(order), BEGINNING, "nothing"
        texts: list[str] = []
        async for batch in broker.read(token_stream(0), token_subject(Address.at(0, TENANT, name, name))):
            for stored in batch:
                event = decode_event(stored.data)
                position, verdict = judge(position, type_of(event), event.epoch, event.seq)
                if verdict is Verdict.ACCEPTED and isinstance(event, Delta):
                    texts.append(event.text or "")
                    result.bytes += len(stored.data)
                end = type_of(event)
                if isinstance(event, Completed) and event.counted.output == 0:
                    self._problem(f"stream {order.stream}: its tokens were not counted")
        text, whole = "".join(texts), "".join(pieces)
        result.events += len(texts)
        result.tokens += sum(1 for place in boundaries(pieces) if place <= len(text))
        if text == whole and end == "completed":
            result.complete += 1
            return
        result.mismatches += not whole.startswith(text)
        self._problem(
            f"stream {order.stream}: {len(text)} of {len(whole)} characters in the log, which ends with {end}"
        )

    def _problem(self, text: str) -> None:
        if len(self.result.problems) < PROBLEMS:
            self.result.problems.append(text)


async def _until_done(broker: Broker) -> None:
    waiting = await _waiting(broker)
    while waiting:
        await asyncio.sleep(POLL)
        waiting = await _waiting(broker)


async def _waiting(broker: Broker) -> int:
    answer = await broker.request(f"$JS.API.STREAM.INFO.{REQUESTS}")
    try:
        return msgspec.json.decode(answer or b"", type=_Info).state.messages
    except msgspec.DecodeError as error:
        raise BrokerUnavailable(f"no work queue: {answer!r}") from error


def main() -> None:
    """Read the plan, run, write the result."""
    plan = read_plan()
    client = LogClient(plan)
    asyncio.run(client.run())
    finish(plan, client.result, array("q"))


if __name__ == "__main__":
    main()
