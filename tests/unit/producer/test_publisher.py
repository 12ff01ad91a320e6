"""The publisher against a log that loses, refuses, delays and repeats, without a broker."""

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from services.producer.adapters import publisher as module
from services.producer.adapters.publisher import Lease, LogWriter, Publisher
from services.producer.errors import Fenced, LogUnavailable


class ForgetfulLog:
    """A fake broker that keeps stored messages; ``behave`` decides the fate of each message."""

    def __init__(self) -> None:
        self.is_connected = True
        self.stored: list[bytes] = []
        self.sent = 0
        self.client = SimpleNamespace(new_inbox=lambda: "_INBOX.x")
        self.receive: Any = None
        self.behave = lambda: "store"

    async def listen(self, _subject: str, arrival: Any) -> None:
        self.receive = arrival

    def on_reconnect(self, _callback: Any) -> None:
        pass

    def send(self, _subject: str, data: bytes, reply: str) -> None:
        self.sent += 1
        match self.behave():
            case "store":
                self.stored.append(data)
                self.answer(reply, b'{"stream":"TOKENS_0","seq":1}')
            case "store silently":
                self.stored.append(data)
            case "refuse":
                self.answer(reply, b'{"error":{"code":503,"description":"insufficient resources"}}')
            case "lose":
                pass

    def answer(self, reply: str, data: bytes) -> None:
        asyncio.get_running_loop().call_soon(self.receive, reply, data, b"")


async def started(log: ForgetfulLog, **options: float) -> Publisher:
    publisher = Publisher(log, **options)  # type: ignore[arg-type]
    await publisher.start()
    return publisher


def leased(publisher: Publisher, seconds: float = 60.0) -> LogWriter:
    return publisher.writer("tokens.0.t.s.g", Lease(asyncio.get_running_loop().time() + seconds))


def in_order(stored: list[bytes], count: int) -> bool:
    """Whether a reader that takes only the next expected event gets all of them."""
    expected = 0
    for data in stored:
        if int(data) == expected:
            expected += 1
    return expected == count


async def test_every_event_is_stored_once_without_faults() -> None:
    log = ForgetfulLog()
    publisher = await started(log)
    writer = leased(publisher)
    for number in range(2_000):
        await writer.publish(str(number).encode())
    await writer.drain()
    assert [int(data) for data in log.stored] == list(range(2_000))
    assert writer.unacknowledged == 0


@pytest.mark.parametrize("seed", range(20))
async def test_under_loss_refusal_and_silence_every_event_is_stored_in_acceptable_order(seed: int) -> None:
    chance = random.Random(seed)
    log = ForgetfulLog()
    log.behave = lambda: chance.choice(["store"] * 6 + ["lose", "refuse", "store silently"])
    publisher = await started(log, ack_timeout=0.02)
    watch = asyncio.create_task(publisher.watch())
    writer = leased(publisher)
    async with asyncio.timeout(20):
        for number in range(200):
            await writer.publish(str(number).encode())
        log.behave = lambda: "store"
        await writer.drain()
    watch.cancel()
    assert in_order(log.stored, 200)


async def test_a_full_window_makes_the_caller_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_EVENTS", 10)
    log = ForgetfulLog()
    log.behave = lambda: "store silently"
    writer = leased(await started(log))
    for number in range(9):
        await writer.publish(str(number).encode())
    waiting = asyncio.create_task(writer.publish(b"9"))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert len(log.stored) == 10
    writer.acknowledge(0, 0)
    await waiting


async def test_a_batch_enters_the_window_whole_even_when_it_fills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_EVENTS", 3)
    log = ForgetfulLog()
    log.behave = lambda: "store silently"
    writer = leased(await started(log))
    writer.enqueue([str(number).encode() for number in range(5)])
    assert [int(data) for data in log.stored] == list(range(5))
    waiting = asyncio.create_task(writer.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    for number in range(3):
        writer.acknowledge(0, number)
    await waiting


async def test_a_window_is_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_BYTES", 100)
    log = ForgetfulLog()
    log.behave = lambda: "store silently"
    writer = leased(await started(log))
    waiting = asyncio.create_task(writer.publish(b"x" * 120))
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()


async def test_acknowledgements_out_of_order_move_the_window_only_over_a_complete_prefix() -> None:
    log = ForgetfulLog()
    log.behave = lambda: "store silently"
    writer = leased(await started(log))
    for number in range(4):
        await writer.publish(str(number).encode())
    writer.acknowledge(0, 2)
    writer.acknowledge(0, 1)
    assert writer.unacknowledged == 4
    writer.acknowledge(0, 0)
    assert writer.unacknowledged == 1
    writer.acknowledge(0, 0)
    writer.acknowledge(0, 99)
    assert writer.unacknowledged == 1


async def test_an_acknowledgement_from_before_going_back_does_not_count() -> None:
    log = ForgetfulLog()
    log.behave = lambda: "lose"
    writer = leased(await started(log))
    for number in range(3):
        await writer.publish(str(number).encode())
    writer.go_back(asyncio.get_running_loop().time())
    writer.acknowledge(0, 0)
    assert writer.unacknowledged == 3
    writer.acknowledge(1, 0)
    assert writer.unacknowledged == 2


async def test_events_wait_while_the_lease_is_expired_and_are_published_when_it_is_resumed() -> None:
    log = ForgetfulLog()
    publisher = await started(log)
    writer = leased(publisher, seconds=-0.1)
    await writer.publish(b"0")
    writer.enqueue([b"1"])
    writer.go_back(asyncio.get_running_loop().time())
    assert log.sent == 0
    writer.lease.until += 60
    publisher.resume(writer.lease)
    async with asyncio.timeout(5):
        await writer.drain()
    assert log.stored == [b"0", b"1"]


async def test_a_generation_is_not_begun_after_the_lease() -> None:
    """The writer may have read its successor's events, so that the condition alone would let it take over from it."""
    log = ForgetfulLog()
    writer = leased(await started(log), seconds=-0.1)
    with pytest.raises(Fenced):
        await writer.publish_first(b"0", 7)
    assert log.sent == 0


async def test_nothing_is_published_with_a_lost_lease() -> None:
    log = ForgetfulLog()
    writer = leased(await started(log))
    writer.lease.is_lost = True
    with pytest.raises(Fenced):
        await writer.publish(b"0")
    with pytest.raises(Fenced):
        await writer.publish_first(b"0", 7)
    assert log.sent == 0


async def test_a_lease_that_is_lost_while_waiting_ends_the_wait() -> None:
    log = ForgetfulLog()
    log.behave = lambda: "lose"
    publisher = await started(log, ack_timeout=0.02)
    watch = asyncio.create_task(publisher.watch())
    writer = leased(publisher)
    await writer.publish(b"0")
    asyncio.get_running_loop().call_later(0.1, setattr, writer.lease, "is_lost", True)
    with pytest.raises(Fenced):
        async with asyncio.timeout(5):
            await writer.drain()
    watch.cancel()


async def test_a_log_that_refuses_every_event_raises_log_unavailable_after_the_timeout() -> None:
    log = ForgetfulLog()
    log.behave = lambda: "refuse"
    publisher = await started(log, ack_timeout=0.02, give_up=0.1)
    watch = asyncio.create_task(publisher.watch())
    writer = leased(publisher)
    await writer.publish(b"0")
    with pytest.raises(LogUnavailable, match="insufficient resources"):
        async with asyncio.timeout(5):
            await writer.drain()
    watch.cancel()


async def test_while_disconnected_nothing_is_sent_and_everything_is_after_it() -> None:
    log = ForgetfulLog()
    log.is_connected = False
    publisher = await started(log, ack_timeout=0.02)
    watch = asyncio.create_task(publisher.watch())
    writer = leased(publisher)
    for number in range(3):
        await writer.publish(str(number).encode())
    assert log.sent == 0
    log.is_connected = True
    async with asyncio.timeout(5):
        await writer.drain()
    watch.cancel()
    assert in_order(log.stored, 3)


async def test_acknowledgements_for_a_closed_writer_are_ignored() -> None:
    log = ForgetfulLog()
    log.behave = lambda: "store silently"
    publisher = await started(log)
    writer = leased(publisher)
    await writer.publish(b"0")
    writer.close()
    log.answer("_INBOX.x.1.0.0", b'{"seq":1}')
    await asyncio.sleep(0.01)
    assert writer.unacknowledged == 0


async def test_repeats_back_off_while_the_log_is_silent_and_reset_on_its_next_reply() -> None:
    log = ForgetfulLog()
    log.behave = lambda: "lose"
    writer = leased(await started(log, ack_timeout=1.0))
    await writer.publish(b"0")
    patience = [writer.patience]
    for _ in range(5):
        writer.go_back(asyncio.get_running_loop().time())
        patience.append(writer.patience)
    assert patience == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    writer.refuse("no leader")
    assert writer.patience == 1.0
    writer.go_back(asyncio.get_running_loop().time())
    writer.acknowledge(6, 0)
    assert writer.patience == 1.0


async def test_an_acknowledgement_of_an_earlier_run_counts_as_progress() -> None:
    log = ForgetfulLog()
    log.behave = lambda: "store silently"
    writer = leased(await started(log, ack_timeout=1.0))
    for number in range(3):
        await writer.publish(str(number).encode())
    writer.go_back(asyncio.get_running_loop().time())
    before = writer.progress_at = 0.0
    writer.acknowledge(0, 2)
    assert writer.progress_at > before
    assert writer.unacknowledged == 3
