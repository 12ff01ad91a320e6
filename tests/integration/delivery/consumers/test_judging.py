"""Test that services receive exactly the accepted events, for any log and any delivery order."""

import asyncio
import random

import msgspec
import pytest

from schemas.acceptance import BEGINNING, Verdict, judge
from schemas.codec import MalformedEvent, decode_header
from schemas.events import Delta, Event, Restarted
from services.kit.jetstream.broker import Broker
from tests.conftest import eventually
from tests.support.consumer_server import Service, consuming
from tests.support.delivery_server import Log, interleaved, metric, story


def disturbed(rng: random.Random, generation: str) -> list[Event]:
    """A generation as writers leave it that repeat, are taken over, and do not know that they are."""
    written: list[Event] = []
    run: list[Event] = list(story(generation, rng.randint(1, 8)))
    for event in run:
        written += [event] * rng.choice([1, 1, 1, 2])
        if rng.random() < 0.1:
            written += rng.choices(run, k=3)
    if rng.random() < 0.5:
        cut = rng.randint(1, len(run) - 1)
        written = [e for e in written if e.seq < cut] or run[:1]
        reached = max(e.seq for e in written) + 1
        written.append(Restarted(generation=generation, seq=reached, epoch=2, reason="producer_lost"))
        for n in range(reached + 1, reached + 5):
            written.append(Delta(generation=generation, seq=n, epoch=2, text=f"again {n}"))
            written += rng.choices(run, k=rng.choice([0, 0, 1]))
    return written


async def stored(broker: Broker) -> list[tuple[int, str, bytes]]:
    return [(m.seq, m.subject, m.data) async for batch in broker.read("TOKENS_0", "tokens.>") for m in batch]


def accepted(log: list[tuple[int, str, bytes]]) -> set[int]:
    """The stream sequences that the rule accepts of a log that is read once, from its beginning."""
    positions, found = {}, set()
    for seq, subject, data in log:
        try:
            header = decode_header(data)
        except MalformedEvent:
            continue
        position, verdict = judge(positions.get(subject, BEGINNING), header.type, header.epoch, header.seq)
        positions[subject] = position
        if verdict is Verdict.ACCEPTED:
            found.add(seq)
    return found


@pytest.mark.parametrize(("seed", "remembered"), [(1, 20_000), (2, 20_000), (3, 1), (4, 1), (5, 2)])
async def test_connections_that_share_a_consumer_and_lose_or_refuse_events_receive_the_accepted_events(
    nats_url: str, broker: Broker, seed: int, remembered: int
) -> None:
    rng = random.Random(seed)
    log = Log(broker)
    runs = [disturbed(rng, f"g{n}") for n in range(4)]
    async with consuming(nats_url) as one, consuming(nats_url) as two:
        for stage in (one, two):
            stage.consumers._judge._limit = remembered
        services = [await Service(one).created(ack_wait=1.0, max_deliver=1_000), Service(two)]
        given: dict[str, bytes] = {}

        async def read(service: Service) -> None:
            while True:
                events = await service.batch(batch=rng.randint(1, 12), wait=0.3)
                for event in events:
                    data = msgspec.json.encode(event["event"])
                    assert given.setdefault(event["cursor"], data) == data
                kept = [e["token"] for e in events if rng.random() < 0.8]
                refused = [e["token"] for e in events if e["token"] not in kept and rng.random() < 0.5]
                await service.settle(acks=kept, nacks=refused)

        readers = [asyncio.create_task(read(service)) for service in services]
        try:
            for event in interleaved(rng, *runs):  # type: ignore[arg-type]  # events of all kinds
                await log.append(event)  # type: ignore[arg-type]
                if rng.random() < 0.05:
                    await log.append_bytes(event.generation, b"garbage")

            async def settled() -> bool:
                for reader in readers:
                    if reader.done():
                        reader.result()
                view = await services[0].view()
                return (view["pending"], view["in_flight"]) == (0, 0)

            await eventually(settled, timeout=60, interval=0.2)
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
    assert {int(cursor[-12:], 16) for cursor in given} == accepted(await stored(broker))


async def test_a_connection_alone_reads_nothing_back(nats_url: str, broker: Broker) -> None:
    async with consuming(nats_url) as stage:
        service = await Service(stage).created()
        before = metric("tailrace_delivery_consumer_read_back_total")
        async with service.stream(ack="auto") as lines:
            await eventually(lambda: metric("tailrace_delivery_consumer_sessions") == 1)
            for n in range(5):
                await Log(broker).append(*story(f"g{n}", 20))
            assert len(await lines.some(5 * 23)) == 115
        assert metric("tailrace_delivery_consumer_read_back_total") == before
