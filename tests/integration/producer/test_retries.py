"""Refusals, failover, circuits and deadlines on a real broker, with providers that are real HTTP servers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest
from aiohttp import web
from prometheus_client import REGISTRY

from schemas.events import AnyEvent, Completed, Delta, Failed, Restarted, Started, UsageReported, type_of
from schemas.requests import Request, RequestDeadlines
from schemas.topology import DEAD
from services.kit.jetstream.broker import Broker
from services.producer import call
from services.producer.adapters import publisher
from services.producer.core.deadlines import Deadlines
from services.producer.core.retry import RetryPolicy
from tests.conftest import eventually
from tests.support.openai_answers import (
    COMMENT,
    ONCE,
    QUICK,
    answered,
    assert_sound,
    cancel,
    chunk,
    code_of,
    config,
    cut_off,
    deltas,
    ending,
    kinds,
    noticed,
    notices,
    refusing,
    saying,
    silent,
)
from tests.support.producer_worker import accepted_log, ask, ended_log, enqueue, producing, text_of
from tests.support.provider_server import Provider, Replay, providing, unlistening_port


@pytest.mark.parametrize(
    ("status", "code"), [(429, "upstream_rate_limited"), (500, "upstream_error"), (503, "upstream_overloaded")]
)
async def test_a_provider_that_refuses_twice_is_called_three_times(broker: Broker, status: int, code: str) -> None:
    request = ask("g1", "m")
    counted = retries(code)
    async with providing(saying("Hel", "lo")) as provider, producing(broker, config=config(provider.url), retry=QUICK):
        provider.turns = [refusing(status), refusing(status)]
        events = await answered(broker, request)
    assert [kind for kind in kinds(events) if kind != "delta"] == [
        "started",
        "notice retrying",
        "notice retrying",
        "usage",
        "completed",
    ]
    assert [(n.attempt, n.provider, n.upstream_model) for n in notices(events, "retrying")] == [
        (2, "p0", "m"),
        (3, "p0", "m"),
    ]
    assert all(
        n.delay is not None and 0 <= n.delay <= 0.2 and str(status) in n.message for n in notices(events, "retrying")
    )
    assert text_of(events) == "Hello"
    assert len(provider.asked) == 3
    assert retries(code) == counted + 2


def retries(code: str) -> float:
    labels = {"provider": "p0", "code": code}
    return REGISTRY.get_sample_value("tailrace_producer_retries_total", labels) or 0.0


async def test_a_provider_that_starts_listening_later_is_reached(broker: Broker) -> None:
    request = ask("g1", "m")
    async with unlistening_port() as port:
        pass
    policy = RetryPolicy(max_attempts=20, wait="linear", base=0.1, maximum=0.2)
    async with producing(broker, config=config(f"http://127.0.0.1:{port}"), retry=policy):
        await enqueue(broker, request)
        await noticed(broker, request, "retrying")
        async with listening(port, saying("here")):
            events = await ended_log(broker, request)
    assert text_of(events) == "here"
    assert isinstance(events[-1], Completed)
    assert "cannot be reached" in notices(events, "retrying")[0].message


@contextlib.asynccontextmanager
async def listening(port: int, replay: Replay) -> AsyncIterator[Provider]:
    """A provider on a port known before."""
    provider = Provider(replay)
    app = web.Application()
    app.router.add_post("/{path:.*}", provider.answer)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield provider
    finally:
        await runner.cleanup()


async def test_attempts_are_bounded_and_the_last_failure_ends_the_generation(broker: Broker) -> None:
    async with providing(refusing(500)) as provider, producing(broker, config=config(provider.url), retry=QUICK):
        failed = (await answered(broker, ask("g1", "m")))[-1]
    assert isinstance(failed, Failed)
    assert (failed.code, failed.upstream_status, failed.recoverable) == ("upstream_error", 500, True)
    assert len(provider.asked) == 3


async def test_retry_after_of_the_provider_is_honoured(broker: Broker) -> None:
    request = ask("g1", "m")
    async with providing(saying("x")) as provider, producing(broker, config=config(provider.url), retry=QUICK):
        provider.turns = [refusing(429, retry_after_ms="150")]
        events = await answered(broker, request)
    (notice,) = notices(events, "retrying")
    assert notice.delay is not None
    assert notice.delay >= 0.15
    assert events[events.index(notice) + 1].at - notice.at >= 0.15


async def test_a_retry_after_beyond_the_maximum_causes_a_failover(broker: Broker) -> None:
    async with (
        providing(refusing(429, retry_after="60")) as busy,
        providing(saying("other")) as other,
        producing(broker, config=config(busy.url, other.url), retry=QUICK),
    ):
        events = await answered(broker, ask("g1", "m"))
    assert kinds(events) == ["started", "notice failover", "delta", "usage", "completed"]
    assert len(busy.asked) == 1


async def test_failover_tries_the_candidates_in_order(broker: Broker) -> None:
    async with providing(refusing(500)) as one, providing(refusing(503)) as two, providing(saying("third")) as three:
        setup = config(one.url, two.url, three.url)
        async with producing(broker, config=setup, retry=RetryPolicy(max_attempts=2, base=0.01)):
            events = await answered(broker, ask("g1", "m"))
    assert kinds(events) == [
        "started",
        "notice retrying",
        "notice failover",
        "notice retrying",
        "notice failover",
        "delta",
        "usage",
        "completed",
    ]
    assert [(n.provider, n.attempt) for n in notices(events, "failover")] == [("p1", 3), ("p2", 5)]
    assert [len(p.asked) for p in (one, two, three)] == [2, 2, 1]
    assert isinstance(events[0], Started)
    assert events[0].provider == "p0"
    assert isinstance(events[-2], UsageReported)
    assert events[-2].provider == "p2"
    assert text_of(events) == "third"


async def test_a_candidate_with_failover_disabled_is_skipped(broker: Broker) -> None:
    async with providing(refusing(500)) as one, providing(saying("no")) as two, providing(saying("yes")) as three:
        candidates = ["p0/m", {"model": "p1/m", "failover": False}, "p2/m"]
        setup = config(one.url, two.url, three.url, alias={"candidates": candidates})
        async with producing(broker, config=setup):
            events = await answered(broker, ask("g1", "m"))
            alone = await answered(broker, ask("g2", "p1/m"))
    assert [n.provider for n in notices(events, "failover")] == ["p2"]
    assert text_of(events) == "yes"
    assert text_of(alone) == "no"


async def test_a_bad_request_causes_no_failover(broker: Broker) -> None:
    async with (
        providing(refusing(400)) as one,
        providing(saying("never")) as two,
        producing(broker, config=config(one.url, two.url), retry=QUICK),
    ):
        events = await answered(broker, ask("g1", "m"))
    assert kinds(events) == ["started", "failed"]
    assert isinstance(events[-1], Failed)
    assert (events[-1].code, events[-1].upstream_status) == ("upstream_bad_request", 400)
    assert not events[-1].recoverable
    assert (len(one.asked), len(two.asked)) == (1, 0)


async def test_no_call_is_retried_after_the_first_token(broker: Broker) -> None:
    async with (
        providing(cut_off("half ")) as one,
        providing(saying("never")) as two,
        producing(broker, config=config(one.url, two.url), retry=QUICK),
    ):
        events = await answered(broker, ask("g1", "m"))
    assert kinds(events) == ["started", "delta", "failed"]
    assert isinstance(events[-1], Failed)
    assert events[-1].code == "upstream_cut_off"
    assert text_of(events) == "half "
    assert (len(one.asked), len(two.asked)) == (1, 0)


async def test_a_restartable_answer_is_restarted_in_the_next_epoch(broker: Broker) -> None:
    request = ask("g1", "m", on_producer_loss="restart")
    async with providing(saying("whole", " answer")) as provider:
        provider.turns = [cut_off("half "), refusing(500), cut_off("a third ")]
        policy = RetryPolicy(max_attempts=5, base=0.01)
        async with producing(broker, config=config(provider.url), retry=policy):
            events = await answered(broker, request)
    assert kinds(events) == [
        "started",
        "delta",
        "restarted",
        "notice retrying",
        "delta",
        "restarted",
        "delta",
        "usage",
        "completed",
    ]
    assert [event.epoch for event in events if isinstance(event, Restarted)] == [2, 3]
    assert text_of(events) == "whole answer"
    assert isinstance(events[-1], Completed)
    assert events[-1].counted.output == [e.tokens for e in events if isinstance(e, Delta)][-1] < 5


async def test_usage_of_an_earlier_call_is_not_attributed_to_the_answer(broker: Broker) -> None:
    async with providing(saying("x")) as provider:
        _finish, usage, _done = ending().strip().split(b"\n\n")
        provider.turns = [Replay([usage + b"\n\n"])]
        provider.replay = Replay([chunk("x"), ending(usage=False)])
        async with producing(broker, config=config(provider.url), retry=QUICK):
            events = await answered(broker, ask("g1", "m"))
    assert kinds(events) == ["started", "notice retrying", "delta", "completed"]


async def test_a_circuit_opens_is_skipped_and_closes_again(broker: Broker) -> None:
    async with (
        providing(refusing(500)) as provider,
        producing(broker, config=config(provider.url), retry=ONCE, circuit=(2, 0.5)),
    ):
        for number in range(2):
            assert code_of(await answered(broker, ask(f"g{number}", "m"))) == "upstream_error"
        skipped = (await answered(broker, ask("g2", "m")))[-1]
        assert isinstance(skipped, Failed)
        assert (skipped.code, skipped.recoverable) == ("upstream_circuit_open", True)
        assert len(provider.asked) == 2
        provider.replay = saying("back")

        async def recovered() -> list[AnyEvent] | None:
            request = ask(f"g{recovered.count}", "m")  # type: ignore[attr-defined]  # counts the tries
            recovered.count += 1  # type: ignore[attr-defined]
            events = await answered(broker, request)
            return events if isinstance(events[-1], Completed) else None

        recovered.count = 3  # type: ignore[attr-defined]
        assert text_of(await eventually(recovered)) == "back"
        assert isinstance((await answered(broker, ask("last", "m")))[-1], Completed)


async def test_half_open_only_one_call_reaches_the_provider(broker: Broker) -> None:
    release = asyncio.Event()
    async with (
        providing(refusing(500)) as provider,
        producing(broker, config=config(provider.url), retry=ONCE, circuit=(1, 0.3)),
    ):
        await answered(broker, ask("g0", "m"))
        provider.replay = saying("back", headers_after=release)

        async def trying() -> bool:
            trying.count += 1  # type: ignore[attr-defined]  # counts the tries
            await enqueue(broker, ask(f"try{trying.count}", "m"))  # type: ignore[attr-defined]
            return provider.active == 1

        trying.count = 0  # type: ignore[attr-defined]
        await eventually(trying, interval=0.1)
        others = [ask(f"other{n}", "m") for n in range(5)]
        for other in others:
            assert code_of(await answered(broker, other)) == "upstream_circuit_open"
        assert provider.active == 1
        release.set()
        await eventually(lambda: provider.active == 0)
        assert isinstance((await answered(broker, ask("g9", "m")))[-1], Completed)


async def test_a_trial_that_is_cancelled_leaves_room_for_the_next(broker: Broker) -> None:
    async with (
        providing(refusing(500)) as provider,
        producing(broker, config=config(provider.url), retry=ONCE, circuit=(1, 0.3)) as producer,
    ):
        await answered(broker, ask("g0", "m"))
        provider.replay = saying("never", headers_after=asyncio.Event())
        await eventually(lambda: not producer.context.calls.circuits.is_open("p0", "m", "default"))
        trial = ask("g1", "m")
        await enqueue(broker, trial)
        await eventually(lambda: provider.active == 1)
        await cancel(broker, trial)
        await ended_log(broker, trial)
        provider.replay = saying("back")
        assert text_of(await answered(broker, ask("g2", "m"))) == "back"


async def test_an_open_circuit_is_skipped_without_waiting_for_a_slot(broker: Broker) -> None:
    async with providing(refusing(500)) as down, providing(saying("other")) as other:
        setup = config(down.url, other.url)
        setup["providers"]["p0"]["requests_per_minute"] = 1
        async with producing(broker, config=setup, retry=ONCE, circuit=(1, 1_000.0)):
            for number in range(4):
                assert text_of(await answered(broker, ask(f"g{number}", "m"))) == "other"
    assert len(down.asked) == 1


async def test_a_circuit_opened_by_one_producer_is_respected_by_another(broker: Broker, nats_url: str) -> None:
    async with providing(refusing(500)) as down, Broker.connect(nats_url, "test-other") as other_broker:
        circuit = (2, 1_000.0)
        async with producing(broker, config=config(down.url), circuit=circuit):
            for number in range(2):
                await answered(broker, ask(f"g{number}", "m"))
        assert len(down.asked) == 2
        async with producing(other_broker, config=config(down.url), circuit=circuit) as other:
            await eventually(lambda: other.context.calls.circuits.is_open("p0", "m", "default"))
            assert code_of(await answered(broker, ask("g9", "m"))) == "upstream_circuit_open"
        assert len(down.asked) == 2


@pytest.mark.parametrize(
    ("deadlines", "replay", "code"),
    [
        (Deadlines(connect=0.2), saying("late", headers_after=asyncio.Event()), "connect"),
        (Deadlines(first_token=0.2), silent(), "first token"),
    ],
)
async def test_a_deadline_of_one_call_leads_to_the_next(
    broker: Broker, deadlines: Deadlines, replay: Replay, code: str
) -> None:
    if replay.headers_after is not None:
        replay.headers_after = asyncio.Event()  # one of this test's own loop
    async with providing(replay) as slow, providing(saying("other")) as other:
        setup = config(slow.url, other.url)
        async with producing(broker, config=setup, deadlines=deadlines, retry=RetryPolicy(max_attempts=2, base=0.01)):
            events = await answered(broker, ask("g1", "m"))
        await eventually(lambda: slow.active == 0)
    assert kinds(events) == ["started", "notice retrying", "notice failover", "delta", "usage", "completed"]
    assert notices(events, "retrying")[0].message == f"{code} deadline passed"
    assert len(slow.asked) == slow.abandoned == 2


@pytest.mark.parametrize(
    ("deadlines", "code"),
    [
        (Deadlines(between_tokens=0.3), "deadline_between_tokens"),
        (Deadlines(total=0.4, between_tokens=60), "deadline_total"),
    ],
)
async def test_a_deadline_of_the_answer_ends_it(broker: Broker, deadlines: Deadlines, code: str) -> None:
    async with providing(silent("so far")) as slow, providing(saying("never")) as other:
        async with producing(broker, config=config(slow.url, other.url), deadlines=deadlines, retry=QUICK):
            events = await answered(broker, ask("g1", "m"))
        await eventually(lambda: slow.active == 0)
    assert kinds(events) == ["started", "delta", "failed"]
    assert isinstance(events[-1], Failed)
    assert (events[-1].code, events[-1].recoverable) == (code, True)
    assert text_of(events) == "so far"
    assert not other.asked


async def test_a_slow_log_does_not_count_as_a_stall(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "WINDOW_EVENTS", 1)
    monkeypatch.setattr(call, "STALL_SECONDS", 0.2)
    receive, lost = publisher.Publisher._receive, asyncio.Event()
    go_on = asyncio.Semaphore(0)

    def forgetful(self: publisher.Publisher, subject: str, data: bytes, headers: bytes) -> None:
        if not lost.is_set():
            receive(self, subject, data, headers)

    monkeypatch.setattr(publisher.Publisher, "_receive", forgetful)
    deadlines = Deadlines(between_tokens=0.4)
    async with (
        providing(saying("one", " two", " three", gate=go_on.acquire)) as provider,
        producing(broker, config=config(provider.url), deadlines=deadlines) as producer,
    ):
        request = ask("g1", "m")
        await enqueue(broker, request)
        await deltas(broker, request)
        lost.set()
        for _ in range(5):
            go_on.release()
        await asyncio.sleep(1.0)  # more than twice the deadline
        assert len(producer.running) == 1
        lost.clear()
        events = await ended_log(broker, request)
    assert isinstance(events[-1], Completed)
    assert text_of(events) == "one two three"
    assert not notices(events, "stalled")


async def test_the_total_deadline_includes_retries(broker: Broker) -> None:
    policy = RetryPolicy(max_attempts=20, wait="linear", base=0.2, maximum=0.2)
    async with (
        providing(refusing(500)) as provider,
        producing(broker, config=config(provider.url), deadlines=Deadlines(total=0.5), retry=policy),
    ):
        failed = (await answered(broker, ask("g1", "m")))[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "deadline_total"
    assert 0 < len(provider.asked) < 20


async def test_keep_alive_comments_do_not_count_as_tokens(broker: Broker) -> None:
    async def pause() -> None:
        await asyncio.sleep(0.05)

    comments = [COMMENT] * 1_000
    for deadlines, first, code in [
        (Deadlines(first_token=0.4), [], "deadline_first_token"),
        (Deadlines(between_tokens=0.4), [chunk("one")], "deadline_between_tokens"),
    ]:
        async with providing(Replay([*first, *comments], gate=pause)) as provider:
            async with producing(broker, config=config(provider.url), deadlines=deadlines, retry=ONCE):
                failed = (await answered(broker, ask(code, "m")))[-1]
            await eventually(lambda server=provider: server.active == 0)
        assert isinstance(failed, Failed)
        assert failed.code == code


async def test_a_models_deadline_overrides_the_producers_and_a_requests_overrides_both(broker: Broker) -> None:
    async with providing(silent()) as provider:
        setup = config(provider.url, alias={"first_token": 0.2})
        async with producing(broker, config=setup, deadlines=Deadlines(first_token=60)):
            assert code_of(await answered(broker, ask("g1", "m"))) == "deadline_first_token"
            patient = ask("g2", "m", deadlines=RequestDeadlines(first_token=5))
            await enqueue(broker, patient)
            await eventually(lambda: provider.active == 1)
            assert code_of(await answered(broker, ask("g3", "m"))) == "deadline_first_token"
            assert provider.active == 1, "the patient one still waits"
            await cancel(broker, patient)
            assert type_of((await ended_log(broker, patient))[-1]) == "cancelled"


@pytest.mark.parametrize("own", [{"first_token": 0.1}, {"first_token": 31}, {"between_tokens": 61}, {"total": 9}])
async def test_a_request_with_a_deadline_out_of_bounds_becomes_dead(broker: Broker, own: dict[str, float]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(own, RequestDeadlines)
    async with producing(broker):
        await enqueue(broker, ask("g1", deadlines=RequestDeadlines(**own)))
        dead = await eventually(lambda: broker.last(DEAD, "dead.default.*"))
    assert b'"g1"' in dead.data


async def test_each_stall_is_one_notice(broker: Broker) -> None:
    go_on = asyncio.Semaphore(0)
    async with (
        providing(Replay([chunk("a"), chunk("b"), ending()], gate=go_on.acquire)) as provider,
        producing(broker, config=config(provider.url)),
    ):
        request = ask("g1", "m")
        await enqueue(broker, request)
        for number in (1, 2):
            await deltas(broker, request, number)
            await noticed(broker, request, "stalled")
            await asyncio.sleep(0.3)  # three more looks at the same silence
            go_on.release()
            if number == 1:
                await deltas(broker, request, 2)
                await eventually(lambda: _two_stalls(broker, request), timeout=5)
        go_on.release()
        await ended_log(broker, request)
        events = await assert_sound(broker, request)
    assert kinds(events) == ["started", "delta", "notice stalled", "delta", "notice stalled", "usage", "completed"]
    assert all(n.delay is not None and n.delay >= 1 for n in notices(events, "stalled"))


async def _two_stalls(broker: Broker, request: Request) -> bool:
    return len(notices(await accepted_log(broker, request), "stalled")) == 2
