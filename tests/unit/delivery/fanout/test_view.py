"""Test a view: subscribers at the same position share one write, all others get their own."""

import asyncio
import random
from typing import Any

from schemas.codec import encode_event
from schemas.events import Delta
from services.delivery.fanout.subscriber import Subscriber
from services.delivery.fanout.view import View
from services.delivery.formats.format import Address
from services.delivery.formats.frames import UNLIMITED
from services.delivery.formats.ndjson import NDJSON
from services.delivery.formats.sse import SSE, ServerSentEvents
from services.delivery.formats.tail import Entry, Tail
from tests.support.delivery_server import metric


class Plain(ServerSentEvents):
    """Frames that are easy to read in a test."""

    def frame(self, entry: Entry, at: Address) -> bytes:
        return b"%d;" % entry.seq


class Clock:
    def monotonic(self) -> float:
        return 0.0

    def wall(self) -> float:
        return 0.0


class Client:
    """A client that accepts writes, or waits while it is blocked."""

    def __init__(self) -> None:
        self.taken = b""
        self.open = asyncio.Event()
        self.open.set()

    async def send(self, message: Any) -> None:
        if not self.open.is_set():
            await self.open.wait()
        self.taken += message["body"]

    @property
    def seqs(self) -> list[int]:
        return [int(part) for part in self.taken.split(b";")[:-1]]


PLAIN = Plain()


class Stage:
    """A view, a tail to write to, and clients."""

    def __init__(self) -> None:
        self.tail = Tail(0, 1_000_000)
        self.view = View(self.tail, Address("s", b""), Clock())
        self.said = 0

    def join(self, generation: str | None = None, **start: int) -> tuple[Client, Subscriber]:
        client = Client()
        subscriber = Subscriber(client.send, PLAIN, generation, start.get("seq", 0), start.get("offset", 0))
        self.view.add(subscriber)
        return client, subscriber

    def say(self, generation: str = "g", type_: str = "delta", offset: int = 0) -> int:
        self.said += 1
        data = encode_event(Delta(generation=generation, seq=self.said, text="some text", tokens=1))
        self.tail.append(Entry(self.said, generation, type_, data, offset))
        return self.view.flush(0.0)


async def test_subscribers_at_the_same_position_receive_every_event_once_and_are_counted() -> None:
    stage, before = Stage(), metric("tailrace_delivery_events_delivered_total")
    crowd = [stage.join() for _ in range(50)]
    assert [stage.say() for _ in range(10)] == [50] * 10
    assert all(client.seqs == list(range(1, 11)) for client, _ in crowd)
    assert all((s.seq, s.index) == (10, 10) for _, s in crowd)
    assert metric("tailrace_delivery_events_delivered_total") == before + 500


async def test_a_blocked_subscriber_is_skipped_and_receives_the_missed_events_later() -> None:
    stage = Stage()
    crowd = [stage.join() for _ in range(5)]
    slow, subscriber = crowd[2]
    slow.open.clear()
    for _ in range(4):
        stage.say()
    assert subscriber.seq == 1
    slow.open.set()
    assert await subscriber.through(1)
    stage.say()
    assert all(client.seqs == [1, 2, 3, 4, 5] for client, _ in crowd)


async def test_credit_is_kept_per_client_at_the_same_position() -> None:
    stage = Stage()
    crowd = [stage.join() for _ in range(6)]
    for number, (_, subscriber) in enumerate(crowd[::2]):
        subscriber.limit(number, UNLIMITED)
    for _ in range(5):
        stage.say()
    assert [len(client.seqs) for client, _ in crowd] == [0, 5, 1, 5, 2, 5]
    crowd[0][1].limit(10, UNLIMITED)
    assert crowd[0][0].seqs == [1, 2, 3, 4, 5]


async def test_a_subscriber_inside_an_event_receives_only_its_rest() -> None:
    stage = Stage()
    plain = [stage.join() for _ in range(3)]
    inside = Client()
    subscriber = Subscriber(inside.send, SSE, None, 0, 4)  # 4 characters of the first event are known
    stage.view.add(subscriber)
    assert subscriber.joining
    stage.say()
    assert all(client.seqs == [1] for client, _ in plain)
    assert b'" text"' in inside.taken or b'"text":" text"' in inside.taken
    assert b"some" not in inside.taken


async def test_subscribers_of_one_generation_and_ended_subscribers_receive_no_other_events() -> None:
    stage = Stage()
    everything, ended = [stage.join() for _ in range(3)], [stage.join() for _ in range(3)]
    only = [stage.join("a") for _ in range(3)]
    other = Client()
    lines = Subscriber(other.send, NDJSON, None, 0)
    stage.view.add(lines)
    for _, subscriber in ended:
        subscriber.stop("disconnected")
    generations = [random.Random(1).choice("ab") for _ in range(20)]
    for generation in generations:
        stage.say(generation)
    stage.say("a", "completed")
    stage.say("b")
    assert all(client.seqs == list(range(1, 23)) for client, _ in everything)
    assert all(not client.taken for client, _ in ended)
    wanted = [n for n, generation in enumerate(generations, 1) if generation == "a"]
    assert all(client.seqs == [*wanted, 21] and s.done.result() == "terminal" for client, s in only)
    assert other.taken.count(b"\n") == 22
