"""Test a subscriber: a write that completes at once needs no task, a blocked one gets a task, and order is kept."""

import asyncio
from typing import Any

import pytest

from services.delivery.fanout.subscriber import TRANSITIONS, State, Subscriber
from services.delivery.formats.format import Address
from services.delivery.formats.frames import Chunk, Frames
from services.delivery.formats.sse import ServerSentEvents
from services.delivery.formats.tail import Entry, Tail


class Client:
    """A connection that accepts writes, waits while it is blocked, or is lost."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.under_way = 0
        self.most_under_way = 0
        self.gone: Exception | None = None
        self._open = asyncio.Event()
        self._open.set()

    def block(self) -> None:
        self._open.clear()

    def unblock(self) -> None:
        self._open.set()

    async def send(self, message: dict[str, Any]) -> None:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if not self._open.is_set():
                await self._open.wait()
            if self.gone is not None:
                raise self.gone
            self.taken.append(message["body"])
        finally:
            self.under_way -= 1


class Plain(ServerSentEvents):
    """Frames that are easy to read in a test."""

    def frame(self, entry: Entry, at: Address) -> bytes:
        return b"%d;" % entry.seq


PLAIN = Plain()


class Feed:
    """A minimal feed: a tail that serves ready subscribers."""

    def __init__(self) -> None:
        self.tail = Tail(0, 10_000)
        self.frames = Frames(self.tail, PLAIN, Address("s", b""))

    def say(self, subscriber: Subscriber, count: int = 1) -> None:
        for _ in range(count):
            self.tail.append(Entry(self.tail.end + 1, "g", "delta", b"x"))
            self.serve(subscriber)

    def serve(self, subscriber: Subscriber) -> None:
        if subscriber.ready and subscriber.index < self.tail.end:
            subscriber.deliver(self.frames.chunk(subscriber.index, None, 1_000_000))


@pytest.fixture
async def client() -> Client:
    return Client()


@pytest.fixture
async def subscriber(client: Client) -> Subscriber:
    return Subscriber(client.send, PLAIN, None, 0)


async def test_write_that_does_not_block_completes_at_once(client: Client, subscriber: Subscriber) -> None:
    tasks = len(asyncio.all_tasks())
    Feed().say(subscriber, 3)
    assert client.taken == [b"1;", b"2;", b"3;"]
    assert len(asyncio.all_tasks()) == tasks
    assert (subscriber.index, subscriber.seq, subscriber.ready) == (3, 3, True)


async def test_blocked_write_is_followed_by_one_write_of_all_missed_events(
    client: Client, subscriber: Subscriber
) -> None:
    feed = Feed()
    subscriber.on_ready(feed.serve)
    client.block()
    feed.say(subscriber, 50)
    assert client.taken == []
    assert not subscriber.ready
    assert subscriber.blocked_at is not None
    client.unblock()
    assert await subscriber.through(5)
    await asyncio.sleep(0)
    assert client.taken == [b"1;", b"".join(b"%d;" % n for n in range(2, 51))]
    assert client.most_under_way == 1
    assert subscriber.blocked_at is None


@pytest.mark.parametrize("error", [ConnectionResetError(), RuntimeError("closed")])
async def test_lost_connection_ends_the_stream(client: Client, subscriber: Subscriber, error: Exception) -> None:
    client.gone = error
    Feed().say(subscriber)
    assert await subscriber.done == "disconnected"


async def test_connection_lost_during_a_blocked_write_ends_the_stream(client: Client, subscriber: Subscriber) -> None:
    client.block()
    Feed().say(subscriber)
    client.gone = BrokenPipeError()
    client.unblock()
    assert await subscriber.done == "disconnected"
    assert await subscriber.through(1)


async def test_the_first_reason_to_stop_wins(subscriber: Subscriber) -> None:
    subscriber.stop("drain")
    subscriber.stop("lifetime")
    assert await subscriber.done == "drain"
    assert not subscriber.ready


async def test_terminal_ends_the_stream_with_its_write(client: Client, subscriber: Subscriber) -> None:
    subscriber.deliver(Chunk({"body": b"end"}, 1, 3, 1, 1, ends=True))
    assert client.taken == [b"end"]
    assert await subscriber.done == "terminal"


@pytest.mark.parametrize("reason", ["disconnected", "drain", "evicted"])
async def test_stop_of_a_subscriber_that_is_behind_takes_effect_after_rearm(
    subscriber: Subscriber, reason: str
) -> None:
    subscriber.fall_behind()
    subscriber.stop(reason)
    subscriber.rearm()
    assert await subscriber.done == reason


async def test_subscriber_that_fell_behind_can_be_served_again(client: Client, subscriber: Subscriber) -> None:
    subscriber.fall_behind()
    assert not subscriber.ready
    subscriber.rearm()
    Feed().say(subscriber)
    assert client.taken == [b"1;"]


async def test_catching_up_waits_for_the_client_but_not_beyond_the_end_of_the_stream(
    client: Client, subscriber: Subscriber
) -> None:
    client.block()
    sending = asyncio.create_task(subscriber.send({"type": "http.response.body", "body": b"x", "more_body": True}))
    await asyncio.sleep(0)
    assert not sending.done()
    assert subscriber.blocked_at is not None
    subscriber.stop("evicted")
    async with asyncio.timeout(5):
        await sending
    assert not await subscriber.through(0)
    await subscriber.close()
    assert client.under_way == 0
    assert client.taken == []


async def test_close_cancels_a_blocked_write(client: Client, subscriber: Subscriber) -> None:
    client.block()
    Feed().say(subscriber)
    await asyncio.sleep(0)
    await subscriber.close()
    assert await subscriber.through(0)
    assert client.taken == []


async def test_chunk_without_events_is_not_written(client: Client, subscriber: Subscriber) -> None:
    subscriber.deliver(Chunk(None, 0, 0, 7, 9, ends=False))
    assert client.taken == []
    assert (subscriber.index, subscriber.seq) == (7, 9)


async def test_client_receives_events_up_to_its_credit_and_the_rest_after_more_credit(
    client: Client, subscriber: Subscriber
) -> None:
    feed = Feed()
    subscriber.on_ready(feed.serve)
    subscriber.move(State.LIVE)
    subscriber.limit(1, 1_000)
    feed.say(subscriber, 3)
    assert client.taken == [b"1;"]
    assert not subscriber.ready
    subscriber.limit(1, 1_000)
    assert client.taken == [b"1;", b"2;3;"]
    assert (subscriber.room, subscriber.space) == (-1, 996)


async def test_waiting_for_room_ends_with_a_grant_or_with_the_stream(subscriber: Subscriber) -> None:
    subscriber.limit(0, 1_000)
    waiting = asyncio.create_task(subscriber.has_room())
    await asyncio.sleep(0)
    assert not waiting.done()
    subscriber.limit(1, 1_000)
    await asyncio.wait_for(waiting, 5)
    subscriber.limit(1, 0)
    waiting = asyncio.create_task(subscriber.has_room())
    await asyncio.sleep(0)
    subscriber.stop("drain")
    await asyncio.wait_for(waiting, 5)


@pytest.mark.parametrize(("before", "after"), [(a, b) for a in State for b in State])
async def test_a_subscriber_allows_only_the_transitions_of_the_table(
    subscriber: Subscriber, before: State, after: State
) -> None:
    subscriber.move(before)
    if after is before or after in TRANSITIONS[before]:
        subscriber.move(after)
        assert subscriber.state is after
    else:
        with pytest.raises(RuntimeError, match=f"from {before.value} to {after.value}"):
            subscriber.move(after)


async def test_a_blocked_subscriber_returns_to_its_previous_state(client: Client, subscriber: Subscriber) -> None:
    client.block()
    subscriber.move(State.LIVE)
    subscriber.start({"body": b"first"})
    assert subscriber.state is State.BLOCKED
    assert subscriber.joined
    client.unblock()
    assert await subscriber.through(5)
    assert subscriber.state is State.LIVE
    subscriber.stop("drain")
    assert subscriber.state is State.OVER
    assert not subscriber.joined
