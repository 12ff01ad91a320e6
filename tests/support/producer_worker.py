"""A producer inside the test's own event loop, on a real broker, and queries of its log."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from schemas.acceptance import BEGINNING, Verdict, judge
from schemas.codec import decode_event
from schemas.events import AnyEvent, Delta, is_terminal, type_of
from schemas.requests import Message, Request
from schemas.subjects import Address, request_subject, token_subject
from schemas.topology import token_stream
from services.kit.clock import Clock, SystemClock
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.shutdown import Stop, end
from services.producer.adapters.circuits import Circuits
from services.producer.adapters.publisher import Publisher
from services.producer.adapters.records import Records
from services.producer.adapters.upstreams import Upstreams
from services.producer.call import CallContext
from services.producer.core.deadlines import Deadlines
from services.producer.core.registry import Registry
from services.producer.core.retry import RetryPolicy
from services.producer.late_usage import LateUsage
from services.producer.relay import RelayContext
from services.producer.upstream_limits import UpstreamLimits
from services.producer.worker import Worker
from tests.conftest import eventually


def ask(
    generation: str, model: str = "scripted/story", *, session: str = "s", text: str = "rivers", **fields: Any
) -> Request:
    """Return a request as delivery would queue it."""
    params = fields.pop("params", {"tokens": 20, "tokens_per_second": 2_000})
    return Request(
        tenant="default",
        session=session,
        generation=generation,
        model=model,
        messages=[Message(role="user", content=text)],
        params=params,
        created_at=time.time(),
        **fields,
    )


async def enqueue(broker: Broker, request: Request, pool: str = "default") -> None:
    """Put a request into the work queue."""
    await broker.publish_stored(request_subject(pool, request.generation), msgspec.json.encode(request))


async def raw_log(broker: Broker, request: Request) -> list[AnyEvent]:
    """Return everything the log holds of a generation, repeats and zombies included."""
    subject = token_subject(Address.of(request.tenant, request.session, request.generation, 1))
    return [decode_event(m.data) async for batch in broker.read(token_stream(0), subject) for m in batch]


async def accepted_log(broker: Broker, request: Request) -> list[AnyEvent]:
    """Return the accepted events of a generation."""
    position, accepted = BEGINNING, []
    for event in await raw_log(broker, request):
        position, verdict = judge(position, type_of(event), event.epoch, event.seq)
        if verdict is Verdict.ACCEPTED:
            accepted.append(event)
    return accepted


async def ended_log(broker: Broker, request: Request, *, timeout: float = 15.0) -> list[AnyEvent]:
    """Wait for the terminal and return the accepted events."""

    async def finished() -> list[AnyEvent] | None:
        try:
            events = await accepted_log(broker, request)
        except BrokerUnavailable:  # a slow machine; the deadline holds
            return None
        return events if any(is_terminal(event) for event in events) else None

    events: list[AnyEvent] = await eventually(finished, timeout=timeout, interval=0.05)
    return events


def text_of(events: list[AnyEvent]) -> str:
    """Return the text of the accepted deltas after the last restart."""
    text = ""
    for event in events:
        if type_of(event) == "restarted":
            text = ""
        elif isinstance(event, Delta):
            text += event.text or ""
    return text


@asynccontextmanager
async def producing(
    broker: Broker,
    *,
    config: dict[str, Any] | None = None,
    slots: int = 100,
    lease: float = 15.0,
    max_deliver: int = 5,
    drain: float = 5.0,
    append_timeout: float = 60.0,
    deadlines: Deadlines = Deadlines(),  # noqa: B008  # immutable
    retry: RetryPolicy = RetryPolicy(max_attempts=1),  # noqa: B008  # immutable
    circuit: tuple[int, float] = (1_000, 15.0),
    clock: Clock = SystemClock(),  # noqa: B008  # immutable
) -> AsyncIterator[Worker]:
    """Run a producer while the block runs; leaving it is its SIGTERM."""
    registry = Registry.load(config or {}, os.environ if config else {})
    async with Upstreams.opened(registry, clock) as upstreams:
        publisher = Publisher(broker, ack_timeout=0.5, give_up=append_timeout)
        records = Records(broker)
        late_usage = LateUsage(broker, publisher, clock)
        circuits = Circuits(broker, circuit[0], circuit[1])
        await publisher.start()
        context = RelayContext(
            broker=broker,
            publisher=publisher,
            records=records,
            registry=registry,
            late_usage=late_usage,
            calls=CallContext(upstreams.of, circuits, UpstreamLimits(), retry, deadlines),
            clock=clock,
            partitions=1,
        )
        worker = Worker(context, "default", slots, lease, max_deliver)
        stop = Stop(drain)
        async with asyncio.TaskGroup() as group:
            work = (publisher.watch(), records.write(), circuits.follow())
            background = [group.create_task(each) for each in work]
            running = group.create_task(worker.run(stop))
            try:
                yield worker
            finally:
                stop.set()
                await asyncio.wait({running})
                await end(*background)
                await late_usage.close()
                await records.flush()
