"""Test repeated calls, by the same producer or another one: each is logged with its own numbers."""

from schemas.events import Delta, Notice, Restarted, Started
from services.kit.jetstream.broker import Broker
from services.producer.core.retry import RetryPolicy
from tests.support.openai_answers import (
    ONCE,
    answered,
    code_of,
    config,
    cut_off,
    ending,
    kinds,
    notices,
    refusing,
    saying,
)
from tests.support.producer_worker import ask, producing
from tests.support.provider_server import Replay, providing

FAILS_AFTER_USAGE = Replay(
    [
        ending().replace(b"data: [DONE]\n\n", b""),
        b'data: {"error":{"message":"busy","type":"server_error","code":503}}\n\n',
    ]
)


async def test_each_abandoned_call_is_logged_with_its_own_counts(broker: Broker) -> None:
    request = ask("g1", "m", on_producer_loss="restart")
    async with providing(saying("whole", " answer")) as provider:
        provider.turns = [cut_off("half "), refusing(500), cut_off(), cut_off("a third ")]
        policy = RetryPolicy(max_attempts=5, base=0.01)
        async with producing(broker, config=config(provider.url), retry=policy):
            events = await answered(broker, request)
    calls = [e.call for e in events if isinstance(e, Restarted | Notice) and e.call is not None]
    assert [(c.number, c.code, c.provider, c.upstream_model, c.usage) for c in calls] == [
        (1, "upstream_cut_off", "p0", "m", None),
        (2, "upstream_cut_off", "p0", "m", None),
        (3, "upstream_cut_off", "p0", "m", None),
    ], "the refusal had not begun to answer"
    last_counts = [e.tokens for e in events if isinstance(e, Delta)]
    assert [c.counted.output for c in calls] == [last_counts[0], 0, last_counts[1]]
    started = events[0]
    assert isinstance(started, Started)
    assert {c.counted.input for c in calls} == {started.counted.input}


async def test_failover_notice_has_the_usage_of_a_call_that_failed_without_a_token(broker: Broker) -> None:
    async with (
        providing(FAILS_AFTER_USAGE) as one,
        providing(saying("x")) as two,
        producing(broker, config=config(one.url, two.url), retry=ONCE),
    ):
        events = await answered(broker, ask("g1", "m"))
    (failover,) = notices(events, "failover")
    assert failover.call is not None
    assert failover.call.usage is not None
    assert (failover.call.provider, failover.call.usage.input, failover.call.usage.output) == ("p0", 7, 5)
    assert (failover.call.source, failover.call.counted.output) == ("stream", 0)


async def test_an_abandoned_call_keeps_its_usage_when_the_next_candidate_is_not_called(broker: Broker) -> None:
    """The usage of the first call is logged once and not attributed to a call that was never made."""
    async with (
        providing(FAILS_AFTER_USAGE) as one,
        providing(refusing(500)) as two,
        producing(broker, config=config(one.url, two.url), retry=ONCE, circuit=(1, 1_000.0)),
    ):
        await answered(broker, ask("g1", "p1/m"))
        events = await answered(broker, ask("g2", "m"))
    assert code_of(events) == "upstream_circuit_open"
    assert kinds(events) == ["started", "notice failover", "failed"]
    (failover,) = notices(events, "failover")
    assert failover.call is not None
    assert failover.call.usage is not None
