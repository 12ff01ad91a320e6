"""The pull consumer, buckets and single messages against a real nats-server."""

import asyncio
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any

import pytest

from schemas.subjects import Address, token_subject
from schemas.topology import BUCKET
from services.kit.jetstream import pull
from services.kit.jetstream.ack import ACK, AT_ONCE, IN_PROGRESS, TERM, ack_subject, delivered, stored_at
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.consumer import DurableInfo, Durables
from services.kit.jetstream.errors import MessageTooLarge
from services.kit.jetstream.pull import Arrived, End, PullConsumer
from tests.conftest import NatsServer, eventually

STREAM, DURABLE = "TOKENS_0", "reader"
SUBJECT = token_subject(Address(0, "t", "s", "g"))


async def reader(broker: Broker, **settings: Any) -> PullConsumer:
    config = {"durable_name": DURABLE, "ack_policy": "explicit", "filter_subject": SUBJECT} | settings
    await Durables(broker).create(STREAM, config)
    return PullConsumer(broker, STREAM, DURABLE)


async def store(broker: Broker, *data: bytes) -> None:
    for each in data:
        await broker.publish_stored(SUBJECT, each)


async def info(broker: Broker) -> DurableInfo:
    found = await Durables(broker).info(STREAM, DURABLE)
    assert found is not None
    return found


def texts(arrived: Iterable[Arrived]) -> list[bytes]:
    return [data for _, _, data in arrived]


async def test_a_pull_ends_after_the_requested_number_of_messages(broker: Broker) -> None:
    consumer = await reader(broker)
    await store(broker, b"1", b"2", b"3")
    arrived = await consumer.fetch(2)
    assert (texts(arrived), consumer.end) == ([b"1", b"2"], End.COMPLETE)
    assert [subject.decode() for subject, _, _ in arrived] == [SUBJECT] * 2
    assert [delivered(reply) for _, reply, _ in arrived] == [(1, 1, 1), (1, 2, 2)]
    place = stored_at(arrived[-1][1])
    assert (place.seq, place.pending, place.stamp) == (2, 1, await broker.stamp(STREAM, 2))
    await consumer.close(1.0)


async def test_a_pull_without_wait_ends_empty_after_the_stored_messages(broker: Broker) -> None:
    consumer = await reader(broker)
    assert (await consumer.fetch(5), consumer.end, consumer.reason) == (
        consumer.arrived,
        End.EMPTY,
        "404 No Messages",
    )
    await store(broker, b"1")
    assert (texts(await consumer.fetch(5)), consumer.end) == ([b"1"], End.EMPTY)
    assert consumer.may_pull()


async def test_a_waiting_pull_returns_new_messages_and_ends_empty_at_its_timeout(broker: Broker) -> None:
    consumer = await reader(broker)
    waiting = asyncio.create_task(consumer.fetch(2, wait=30))
    await eventually(lambda: _waiting(broker))
    assert consumer.is_open()
    assert consumer.answering() == 0
    await store(broker, b"1", b"2")
    assert (texts(await waiting), consumer.end) == ([b"1", b"2"], End.COMPLETE)
    assert (texts(await consumer.fetch(2, wait=0.2)), consumer.end) == ([], End.EMPTY)
    assert consumer.reason.startswith("408 ")


async def test_a_pull_that_reaches_its_bound_in_bytes_is_full(broker: Broker) -> None:
    consumer = await reader(broker)
    await store(broker, *(b"x" * 1_000 for _ in range(5)))
    arrived = await consumer.fetch(5, max_bytes=3_000)
    assert (0 < len(arrived) < 5, consumer.end) == (True, End.FULL)
    assert consumer.may_pull()
    assert len(await consumer.fetch(1, max_bytes=500)) == 0
    assert consumer.end is End.FULL


async def test_a_consumer_that_is_deleted_or_missing_is_gone(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "REST_SECONDS", 0.2)
    consumer = await reader(broker)
    waiting = asyncio.create_task(consumer.fetch(1, wait=30))
    await eventually(lambda: _waiting(broker))
    await Durables(broker).delete(STREAM, DURABLE)
    await waiting
    assert (consumer.end, consumer.reason) == (End.GONE, "409 Consumer Deleted")
    assert not consumer.may_pull()
    await eventually(consumer.may_pull)
    await consumer.fetch(1)
    assert (consumer.end, consumer.reason.strip()) == (End.GONE, "503")


async def test_a_pull_beyond_max_waiting_is_refused_and_delays_the_next_pull(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "REST_SECONDS", 0.2)
    first = await reader(broker, max_waiting=1)
    await first.pull(1, wait=30)
    await eventually(lambda: _waiting(broker))
    second = PullConsumer(broker, STREAM, DURABLE)
    await second.fetch(1, wait=1)
    assert (second.end, second.reason) == (End.REFUSED, "409 Exceeded MaxWaiting")
    assert not second.may_pull()
    await eventually(second.may_pull)


async def test_a_pull_without_a_final_status_is_lost_and_its_late_messages_are_kept(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "PATIENCE", 0.2)
    consumer = await reader(broker)
    await store(broker, b"1")
    publish = broker.client.publish
    held: list[tuple[str, bytes, str]] = []

    async def holding(subject: str, data: bytes, *, reply: str = "", headers: dict[str, str] | None = None) -> None:
        held.append((subject, data, reply))

    monkeypatch.setattr(broker.client, "publish", holding)
    assert (texts(await consumer.fetch(2)), consumer.end) == ([], None)
    assert consumer.may_pull()
    monkeypatch.setattr(broker.client, "publish", publish)
    subject, data, reply = held[0]
    await publish(subject, data, reply=reply)
    await eventually(lambda: consumer.arrived)
    await store(broker, b"2")
    assert texts(await consumer.fetch(2)) == [b"1", b"2"]


async def test_a_status_of_an_earlier_pull_ends_no_later_one(broker: Broker) -> None:
    consumer = await reader(broker)
    await consumer.pull(1, wait=0.3)
    await consumer.pull(1, wait=30)
    await asyncio.sleep(0.6)
    assert consumer.is_open()


async def test_a_pull_ends_with_its_connection(own_nats: NatsServer, broker: Broker) -> None:
    async with Broker.connect(own_nats.url, "test-pull") as own:
        await own.js.add_stream(name=STREAM, subjects=[SUBJECT])
        consumer = await reader(own)
        await consumer.pull(1, wait=60)
        assert consumer.is_open()
        own_nats.kill()
        own_nats.start()
        await eventually(lambda: own.is_connected and own.reconnects)
        assert not consumer.is_open()
        assert consumer.may_pull()
        await store(own, b"1")
        assert texts(await consumer.fetch(1)) == [b"1"]


async def test_close_delivers_messages_that_the_server_already_sent(broker: Broker) -> None:
    notified: list[int] = []
    await reader(broker)
    await store(broker, *(b"%d" % n for n in range(200)))
    consumer = PullConsumer(broker, STREAM, DURABLE, lambda: notified.append(len(consumer.arrived)))
    await consumer.pull(300, wait=30)
    await eventually(lambda: consumer.arrived)
    await consumer.close(5.0)
    assert texts(consumer.arrived) == [b"%d" % n for n in range(200)]
    assert len(notified) >= 200, "called after each message"
    await consumer.close(5.0)
    await consumer.fetch(1)
    assert consumer.end is End.EMPTY


async def test_a_closed_waiting_pull_receives_no_more_messages(broker: Broker) -> None:
    first = await reader(broker)
    await first.pull(1, wait=30)
    await eventually(lambda: _waiting(broker))
    await first.close(5.0)
    await store(broker, b"1")
    second = PullConsumer(broker, STREAM, DURABLE)
    assert texts(await second.fetch(1, wait=5)) == [b"1"]
    assert not first.arrived


async def test_a_pull_that_cannot_be_sent_is_not_open(broker: Broker, nats_url: str) -> None:
    await reader(broker)
    async with Broker.connect(nats_url, "test-closed") as closed:
        consumer = PullConsumer(closed, STREAM, DURABLE)
        await consumer.open()
    with pytest.raises(BrokerUnavailable):
        await consumer.pull(1)
    assert not consumer.is_open()
    await consumer.close(1.0)
    with pytest.raises(BrokerUnavailable):
        await consumer.open()


async def test_the_server_understands_each_answer_to_a_delivery(broker: Broker) -> None:
    consumer = await reader(broker, ack_wait=600_000_000_000)
    await store(broker, b"1", b"2", b"3", b"4")
    arrived = await consumer.fetch(4)
    replies = [ack_subject(STREAM, DURABLE, delivered(reply)) for _, reply, _ in arrived]
    for reply, answer in zip(replies, (ACK, AT_ONCE, TERM, IN_PROGRESS), strict=True):
        assert await broker.request(reply, answer) is not None, "it is confirmed"
    again = await consumer.fetch(4, wait=0.5)
    assert [(data, delivered(reply).deliveries) for _, reply, data in again] == [(b"2", 2)]
    found = await info(broker)
    assert (found.ack_floor.stream_seq, found.num_ack_pending) == (1, 2)


async def _waiting(broker: Broker) -> bool:
    return (await info(broker)).num_waiting > 0


async def test_a_bucket_keeps_creates_and_replaces_under_conditions(broker: Broker) -> None:
    bucket = await broker.bucket()
    assert await bucket.get("t.s.g") is None
    first = await bucket.create("t.s.g", b"1")
    assert first is not None
    assert await bucket.create("t.s.g", b"2") is None
    assert not await bucket.update("t.s.g", b"3", first + 1)
    assert await bucket.update("t.s.g", b"4", first)
    entry = await bucket.get("t.s.g")
    assert entry is not None
    assert (entry.value, entry.revision > first) == (b"4", True)
    assert not await bucket.delete("t.s.g", first)
    assert await bucket.delete("t.s.g", entry.revision)
    assert await bucket.get("t.s.g") is None
    assert await bucket.create("t.s.g", b"5") is not None, "a name that was removed is free"


async def test_a_bucket_distinguishes_an_oversized_value_from_an_unavailable_broker(broker: Broker) -> None:
    with pytest.raises(MessageTooLarge):
        await (await broker.bucket()).put("t.s.g", bytes(broker.client.max_payload + 1))
    with pytest.raises(BrokerUnavailable, match="no bucket nothing"):
        await broker.bucket("nothing")
    bucket = await broker.bucket()
    await broker.js.delete_stream(f"KV_{BUCKET}")
    with pytest.raises(BrokerUnavailable):
        await bucket.put("t.s.g", b"1")


async def test_a_watch_yields_current_values_then_changes_and_fails_after_silence(broker: Broker) -> None:
    bucket = await broker.bucket()
    await bucket.put("a.1", b"1")
    await bucket.put("b.1", b"no")
    async with aclosing(bucket.watch("a.>", 0.5)) as entries:
        assert (await anext(entries)).value == b"1"
        await bucket.put("a.2", b"2")
        assert (await anext(entries)).value == b"2"
        with pytest.raises(BrokerUnavailable):
            await anext(entries)


async def test_single_messages_are_read_with_headers_and_removed(broker: Broker) -> None:
    seq = await broker.publish_stored(SUBJECT, b"\x00one", headers={"Tailrace-Reason": "because: of it"})
    await store(broker, b"two")
    found = await broker.get(STREAM, seq)
    assert found is not None
    assert (found.seq, found.subject, found.data) == (seq, SUBJECT, b"\x00one")
    assert (found.headers or {})["Tailrace-Reason"] == "because: of it"
    assert found.time
    assert await broker.get(STREAM, 99) is None
    assert await broker.last("NO_SUCH_STREAM", SUBJECT) is None
    assert await broker.delete(STREAM, seq)
    assert not await broker.delete(STREAM, seq)
    assert await broker.get(STREAM, seq) is None
    await broker.purge(STREAM, SUBJECT)
    assert await broker.last(STREAM, SUBJECT) is None
    with pytest.raises(BrokerUnavailable, match="stream not found"):
        await broker.purge("NO_SUCH_STREAM", SUBJECT)
