"""The broker port against a real nats-server."""

import asyncio
import time
from typing import Any

import pytest

from schemas.subjects import Address, live_filter, log_filter, token_subject
from schemas.topology import Topology
from services.kit.jetstream.broker import Broker, BrokerUnavailable, Stored
from services.kit.jetstream.client import Reply
from tests.conftest import eventually

STREAM = "TOKENS_0"
A = Address(0, "t", "s", "g1")
B = Address(0, "t", "s", "g2")


async def test_applying_the_topology_twice_changes_nothing(broker: Broker) -> None:
    before = await broker.state(STREAM)
    await broker.apply(Topology())
    assert await broker.state(STREAM) == before


async def test_a_stored_event_is_republished_with_its_sequence(broker: Broker) -> None:
    heard = []

    async def hear(msg):  # type: ignore[no-untyped-def]
        heard.append((msg.subject, msg.data, msg.headers["Nats-Sequence"]))

    subscription = await broker.subscribe(live_filter(0, "t", "s"), hear)
    await broker.flush()
    seq = await broker.publish_stored(token_subject(A), b"one")
    await eventually(lambda: heard)
    assert heard == [("live.0.t.s.g1", b"one", str(seq))]
    await subscription.unsubscribe()


async def test_reading_returns_all_stored_messages_of_a_filter_in_order(broker: Broker) -> None:
    for number in range(2_500):
        await broker.publish(token_subject(A if number % 2 else B), str(number).encode())
    await eventually(lambda: _last(broker, 2_500))
    both = [m async for batch in broker.read(STREAM, log_filter(0, "t", "s")) for m in batch]
    assert [int(m.data) for m in both] == list(range(2_500))
    one = [m async for batch in broker.read(STREAM, token_subject(A), 100, up_to=201) for m in batch]
    assert [m.seq for m in one] == list(range(100, 202, 2))
    first = await broker.first(STREAM, token_subject(A))
    assert first is not None
    assert first.seq == 2
    last = await broker.last(STREAM, log_filter(0, "t", "s"))
    assert last is not None
    assert (last.seq, last.subject) == (2_500, token_subject(A))


async def test_a_read_up_to_a_sequence_requests_no_more_messages_than_the_range(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(300):
        await broker.publish(token_subject(B if number % 3 else A), str(number).encode())
    await eventually(lambda: _last(broker, 300))
    fetched: list[int] = []
    read_batch = broker._read_batch

    async def counted(stream: str, filter_: str, from_seq: int, size: int) -> tuple[list[Stored], int]:
        batch, pending = await read_batch(stream, filter_, from_seq, size)
        fetched.append(len(batch))
        return batch, pending

    monkeypatch.setattr(broker, "_read_batch", counted)

    async def read(filter_: str, from_seq: int, up_to: int) -> list[int]:
        return [m.seq async for batch in broker.read(STREAM, filter_, from_seq, up_to=up_to) for m in batch]

    everything = log_filter(0, "t", "s")
    assert await read(everything, 11, 30) == list(range(11, 31))
    assert sum(fetched) == 20
    fetched.clear()
    assert await read(token_subject(A), 2, 31) == list(range(4, 32, 3))
    assert sum(fetched) <= 30
    fetched.clear()
    assert await read(everything, 31, 30) == []
    assert fetched == []


async def test_a_lost_request_is_repeated(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    await broker.publish_stored(token_subject(A), b"one")
    asked: list[str] = []
    publish = broker.client.publish

    async def losing_the_first(subject: str, *arguments: object, **named: object) -> None:
        asked.append(subject)
        if len(asked) > 1:
            await publish(subject, *arguments, **named)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(broker.client, "publish", losing_the_first)
    found = [m.data async for batch in broker.read(STREAM, token_subject(A)) for m in batch]
    assert (found, asked[:2]) == ([b"one"], [f"$JS.API.DIRECT.GET.{STREAM}"] * 2)


async def test_a_slow_reply_is_not_requested_twice(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        await broker.publish_stored(token_subject(A), b"x")
    monkeypatch.setattr("services.kit.jetstream.broker.READ_TRIES", (0.3, 0.3))
    ask, asked, loop = broker.client.ask, [], asyncio.get_running_loop()

    async def late(subject: str, payload: bytes, receive: Reply, *more: Any) -> bytes:
        if "DIRECT.GET" not in subject:
            return await ask(subject, payload, receive, *more)
        asked.append(subject)
        answers = 0

        def slow(data: bytes, headers: bytes | None) -> None:
            nonlocal answers
            loop.call_later(0.2 * answers, receive, data, headers)
            answers += 1

        return await ask(subject, payload, slow, *more)

    monkeypatch.setattr(broker.client, "ask", late)
    found = [m.data async for batch in broker.read(STREAM, token_subject(A)) for m in batch]
    assert (found, len(asked)) == ([b"x"] * 3, 1)


async def test_a_reply_at_the_moment_of_the_timeout_does_no_harm(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.publish_stored(token_subject(A), b"x")
    monkeypatch.setattr("services.kit.jetstream.broker.READ_TRIES", (0.1, 5.0))
    ask, loop, failed = broker.client.ask, asyncio.get_running_loop(), []

    async def at_the_timeout(subject: str, payload: bytes, receive: Reply, *more: Any) -> bytes:
        monkeypatch.setattr(broker.client, "ask", ask)

        def arrive() -> None:
            try:
                receive(b"x", b"NATS/1.0\r\nNats-Sequence: 1\r\n\r\n")
            except RuntimeError as error:
                failed.append(error)

        # A loop that is blocked handles the timeout and the reply in one round, before the reader can run.
        loop.call_later(0.01, time.sleep, 0.3)
        loop.call_later(0.2, arrive)
        await asyncio.sleep(5)  # sending takes long
        return b"lost"

    monkeypatch.setattr(broker.client, "ask", at_the_timeout)
    found = [m.data async for batch in broker.read(STREAM, token_subject(A)) for m in batch]
    assert (found, failed) == ([b"x"], [])


async def test_reading_nothing_yields_nothing(broker: Broker) -> None:
    assert [b async for b in broker.read(STREAM, log_filter(0, "t", "nobody"))] == []
    assert await broker.last(STREAM, log_filter(0, "t", "nobody")) is None


async def test_a_request_without_a_responder_is_none(broker: Broker) -> None:
    assert await broker.request("control.t.s.g") is None


async def test_an_unreachable_server_is_named_without_its_password() -> None:
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:9"):
        async with Broker.connect("nats://user:secret@127.0.0.1:9", "test", wait=0.5):
            pass


async def _last(broker: Broker, seq: int) -> bool:
    return (await broker.state(STREAM)).last_seq >= seq
