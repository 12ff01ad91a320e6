"""Test cancellation in every state of a generation, and its effect on the connection to the provider."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from schemas.events import AnyEvent, Cancelled, Delta, UsageReported, type_of
from schemas.requests import GenerationRecord, Request
from services.kit.jetstream.broker import Broker
from services.producer import call, worker
from services.producer.adapters import publisher
from services.producer.core.deadlines import Deadlines
from services.producer.core.retry import RetryPolicy
from services.producer.worker import Worker
from tests.conftest import eventually
from tests.support.openai_answers import (
    assert_sound,
    cancel,
    chunk,
    config,
    deltas,
    ending,
    kinds,
    let_go,
    noticed,
    refusing,
    saying,
)
from tests.support.producer_worker import accepted_log, ask, ended_log, enqueue, producing, text_of
from tests.support.provider_server import Provider, Replay, providing

LONG_PAUSES = RetryPolicy(max_attempts=3, wait="linear", base=60, maximum=60)
GENEROUS = 2.0
"""Ten times what closing the connection may take: a loaded machine is no failure, a forgotten connection is."""


async def cancelled(broker: Broker, request: Request) -> list[AnyEvent]:
    """Wait for the terminal, which must be a requested cancellation."""
    await ended_log(broker, request)
    events = await assert_sound(broker, request)
    assert isinstance(events[-1], Cancelled)
    assert events[-1].reason == "requested"
    return events


def withheld() -> Replay:
    return Replay(headers_after=asyncio.Event())


def silent(*texts: str) -> Replay:
    return Replay([chunk(text) for text in texts], end="hang")


async def is_asked(_broker: Broker, _request: Request, provider: Provider) -> None:
    await eventually(lambda: provider.active == 1)


async def is_streaming(broker: Broker, request: Request, _provider: Provider) -> None:
    await deltas(broker, request)


async def is_pausing(broker: Broker, request: Request, _provider: Provider) -> None:
    await noticed(broker, request, "retrying")


@pytest.mark.parametrize(
    ("replay", "until", "expected"),
    [
        (withheld, is_asked, ["started", "cancelled"]),
        (silent, is_asked, ["started", "cancelled"]),
        (lambda: silent("so", " far"), is_streaming, ["started", "delta", "cancelled"]),
        (lambda: refusing(500), is_pausing, ["started", "notice retrying", "cancelled"]),
    ],
    ids=["connecting", "waiting for the first token", "streaming", "pausing before a retry"],
)
async def test_a_cancel_ends_it_and_closes_the_connection_at_once(
    broker: Broker,
    replay: Callable[[], Replay],
    until: Callable[[Broker, Request, Provider], Awaitable[None]],
    expected: list[str],
) -> None:
    request = ask("g1", "m")
    async with providing(replay()) as provider, producing(broker, config=config(provider.url), retry=LONG_PAUSES):
        await enqueue(broker, request)
        await until(broker, request, provider)
        under_way = provider.active
        began = time.monotonic()
        assert await cancel(broker, request) == b"ok"
        await let_go(provider, timeout=GENEROUS)
        seconds = time.monotonic() - began
        events = await cancelled(broker, request)
        assert await eventually(lambda: _nobody_hears(broker, request))
    print(f"connection gone after {seconds * 1000:.1f} ms")  # noqa: T201  # shown with -s
    assert kinds(events) == expected
    assert provider.abandoned == under_way
    assert len(provider.asked) == 1


async def _nobody_hears(broker: Broker, request: Request) -> bool:
    return await cancel(broker, request) is None


async def test_a_cancel_while_waiting_for_a_limit_makes_no_call_and_takes_no_slot(broker: Broker) -> None:
    first, waiting, next_one = ask("g1", "m"), ask("g2", "m"), ask("g3", "m")
    async with (
        providing(silent("a")) as provider,
        producing(broker, config=config(provider.url, max_streams=1)) as producer,
    ):
        await enqueue(broker, first)
        await deltas(broker, first)
        await enqueue(broker, waiting)
        await eventually(lambda: len(producer.running) == 2)
        await enqueue(broker, next_one)
        await eventually(lambda: len(producer.running) == 3)
        await cancel(broker, waiting)
        assert kinds(await cancelled(broker, waiting)) == ["started", "cancelled"]
        assert (provider.active, len(provider.asked)) == (1, 1)
        provider.replay = saying("mine")
        await cancel(broker, first)
        await cancelled(broker, first)
        assert text_of(await ended_log(broker, next_one)) == "mine"
    assert len(provider.asked) == 2


async def test_a_cancel_of_a_request_waiting_for_a_slot_takes_effect(broker: Broker) -> None:
    first, waiting = ask("g1", "m"), ask("g2", "m")
    async with providing(silent("a")) as provider, producing(broker, config=config(provider.url), slots=1):
        await enqueue(broker, first)
        await deltas(broker, first)
        await enqueue(broker, waiting)
        await _note_cancelling(broker, waiting)
        assert await cancel(broker, waiting) is None
        await cancel(broker, first)
        await cancelled(broker, first)
        assert kinds(await cancelled(broker, waiting)) == ["started", "cancelled"]
    assert len(provider.asked) == 1


async def _note_cancelling(broker: Broker, request: Request) -> None:
    record = GenerationRecord(
        tenant=request.tenant,
        session=request.session,
        generation=request.generation,
        state="cancelling",
        model=request.model,
        created_at=request.created_at,
    )
    bucket = await broker.bucket()
    await bucket.put(f"{request.tenant}.{request.session}.{request.generation}", msgspec.json.encode(record))


async def test_a_cancel_after_the_end_changes_nothing(broker: Broker) -> None:
    request = ask("g1")
    async with producing(broker):
        await enqueue(broker, request)
        await ended_log(broker, request)
        await eventually(lambda: _nobody_hears(broker, request))
        assert type_of((await assert_sound(broker, request))[-1]) == "completed"


async def test_repeated_cancels_are_one_cancellation(broker: Broker) -> None:
    request = ask("g1", params={"tokens": 5_000, "tokens_per_second": 50})
    async with producing(broker):
        await enqueue(broker, request)
        await deltas(broker, request, 3)
        await asyncio.gather(*(cancel(broker, request) for _ in range(20)), return_exceptions=True)
        await cancelled(broker, request)


async def test_the_count_of_a_cancelled_answer_equals_the_relayed_tokens(broker: Broker) -> None:
    request = ask("g1", "m")
    async with providing(silent("one two", " three")) as provider, producing(broker, config=config(provider.url)):
        await enqueue(broker, request)
        await eventually(lambda: _has_said(broker, request, "one two three"))
        await cancel(broker, request)
        events = await cancelled(broker, request)
    assert isinstance(events[-1], Cancelled)
    assert events[-1].counted.output == [e.tokens for e in events if isinstance(e, Delta)][-1] > 0


async def _has_said(broker: Broker, request: Request, text: str) -> bool:
    return text_of(await accepted_log(broker, request)) == text


async def test_draining_after_a_cancel_reads_usage_and_relays_no_more_text(broker: Broker) -> None:
    request = ask("g1", "m")
    go_on = asyncio.Semaphore(0)
    replay = Replay([chunk("said"), chunk(" unsaid"), ending()], gate=go_on.acquire)
    async with providing(replay) as provider, producing(broker, config=config(provider.url, after_cancel="drain")):
        await enqueue(broker, request)
        await deltas(broker, request)
        await cancel(broker, request)
        for _ in range(3):
            go_on.release()
        events = await cancelled(broker, request)
    assert kinds(events) == ["started", "delta", "usage", "cancelled"]
    assert text_of(events) == "said"
    assert isinstance(events[-2], UsageReported)
    assert (events[-2].usage.input, events[-2].usage.output) == (7, 5)
    assert provider.active == 0


async def test_the_wait_for_usage_after_a_cancel_is_bounded(broker: Broker) -> None:
    request = ask("g1", "m")
    async with (
        providing(silent("said")) as provider,
        producing(broker, config=config(provider.url, after_cancel="drain", drain_seconds=0.3)),
    ):
        await enqueue(broker, request)
        await deltas(broker, request)
        await cancel(broker, request)
        events = await cancelled(broker, request)
        await let_go(provider)
    assert kinds(events) == ["started", "delta", "cancelled"]
    assert provider.abandoned == 1


async def test_a_stopping_producer_waits_for_usage_no_longer_than_its_drain(broker: Broker) -> None:
    request = ask("g1", "m")
    async with providing(silent("said")) as provider:
        async with producing(
            broker, drain=0.1, lease=600.0, config=config(provider.url, after_cancel="drain", drain_seconds=60.0)
        ):
            await enqueue(broker, request)
            await deltas(broker, request)
            await cancel(broker, request)
        assert kinds(await cancelled(broker, request)) == ["started", "delta", "cancelled"]


async def test_an_answer_that_ends_without_usage_is_not_drained_longer(broker: Broker) -> None:
    request = ask("g1", "m")
    go_on = asyncio.Semaphore(0)
    replay = Replay([chunk("said"), ending(usage=False)], gate=go_on.acquire, end="hang")
    async with (
        providing(replay) as provider,
        producing(broker, config=config(provider.url, after_cancel="drain", drain_seconds=60.0)),
    ):
        await enqueue(broker, request)
        await deltas(broker, request)
        await cancel(broker, request)
        go_on.release()
        go_on.release()
        assert kinds(await cancelled(broker, request)) == ["started", "delta", "cancelled"]


async def test_a_cancel_that_meets_the_deadline_of_one_call_still_cancels(broker: Broker) -> None:
    request = ask("g1", "m")
    async with (
        providing(silent()) as provider,
        producing(broker, config=config(provider.url), retry=LONG_PAUSES) as producer,
    ):
        await enqueue(broker, request)
        await eventually(lambda: provider.active == 1)
        (relay,) = producer.running.values()
        relay.interruption.interrupt("attempt", "deadline_first_token")
        relay.interruption.interrupt("cancelled", "requested")
        assert kinds(await cancelled(broker, request)) == ["started", "cancelled"]


MODELS = {"turns": {"candidates": ["scripted/refuse", "scripted/cutoff", "scripted/story"]}}


@pytest.mark.parametrize("seed", range(8))
async def test_a_cancel_at_any_time_leaves_a_gapless_log_with_one_terminal(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(publisher, "WINDOW_EVENTS", rng.choice([1, 2, 8, 512]))
    monkeypatch.setattr(call, "STALL_SECONDS", 0.005)
    monkeypatch.setattr(worker, "WATCH_INTERVAL", 0.003)
    monkeypatch.setattr(Broker, "publish_stored", _slow(Broker.publish_stored, rng))
    monkeypatch.setattr(publisher.Publisher, "_receive", _late(publisher.Publisher._receive, rng))
    requests = [_random_request(rng, number) for number in range(60)]
    policy = RetryPolicy(max_attempts=3, base=0.02, maximum=0.05)
    deadlines = Deadlines(first_token=0.1, between_tokens=0.1, total=0.4)
    async with producing(broker, config={"models": MODELS}, slots=20, deadlines=deadlines, retry=policy) as producer:
        interrupting = asyncio.create_task(_interrupt_at_random(producer, rng))
        for request in requests:
            await enqueue(broker, request)
        ends = [type_of((await ended_log(broker, request))[-1]) for request in requests]
        interrupting.cancel()
        await eventually(lambda: not producer.running)
    for request in requests:
        await assert_sound(broker, request)
    assert "cancelled" in ends


def _random_request(rng: random.Random, number: int) -> Request:
    model = rng.choice(["scripted/story", "scripted/stall", "scripted/cutoff", "scripted/error", "turns"])
    after = rng.randint(0, 10)
    params: dict[str, Any] = {
        "tokens": rng.randint(1, 60),
        "tokens_per_second": rng.choice([0, 200, 2_000]),
        "stall_after": after,
        "cutoff_after": after,
        "error_after": after,
    }
    wanted = {"scripted/stall": "stall_after", "scripted/error": "error_after"}.get(model, "cutoff_after")
    for knob in ("stall_after", "cutoff_after", "error_after"):
        if knob != wanted or model == "scripted/story":
            del params[knob]
    return ask(f"g{number}", model, params=params, on_producer_loss=rng.choice(["interrupt", "restart"]))


def _late(receive: Any, rng: random.Random) -> Any:
    """Let acknowledgements come late and out of order, so that the window is often full."""

    def receive_late(self: Any, subject: str, data: bytes, headers: bytes) -> None:
        asyncio.get_running_loop().call_later(rng.random() * 0.02, receive, self, subject, data, headers)

    return receive_late


def _slow(publish: Any, rng: random.Random) -> Any:
    """Let appends that are waited for take their time, before and after they are stored."""

    async def publish_slowly(self: Broker, subject: str, data: bytes, **options: Any) -> int:
        if not subject.startswith("tokens."):
            return int(await publish(self, subject, data, **options))
        await asyncio.sleep(rng.random() * 0.01)
        seq = await publish(self, subject, data, **options)
        await asyncio.sleep(rng.random() * 0.01)
        return int(seq)

    return publish_slowly


async def _interrupt_at_random(producer: Worker, rng: random.Random) -> None:
    """Cancel most generations, each so many turns of the loop after so many events."""
    due: dict[str, tuple[int, int]] = {}
    while True:
        await asyncio.sleep(0)
        for relay in list(producer.running.values()):
            name = relay.request.generation
            events, turns = due.setdefault(name, (rng.choice([0, 1, 2, 3, 5, 10, 10**9]), rng.randint(0, 40)))
            if events and (relay.journal is None or relay.journal.generation.next_seq < events):
                continue
            due[name] = (0, turns - 1)
            if turns == 0:
                relay.interruption.interrupt("cancelled", "requested")
