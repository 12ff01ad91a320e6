"""Test permanent refusals: the next candidate is called and an alarm is raised."""

import pytest
from prometheus_client import REGISTRY

from schemas.events import Failed
from services.kit.jetstream.broker import Broker
from tests.support.openai_answers import QUICK, answered, code_of, config, kinds, refusing, saying
from tests.support.producer_worker import ask, producing, text_of
from tests.support.provider_server import Replay, providing

REFUSALS = [
    (401, "upstream_unauthorized"),
    (402, "upstream_unauthorized"),
    (403, "upstream_unauthorized"),
    (404, "upstream_not_found"),
]


def refusals(code: str) -> float:
    labels = {"provider": "p0", "code": code}
    return REGISTRY.get_sample_value("tailrace_producer_upstream_refusals_total", labels) or 0.0


@pytest.mark.parametrize(("status", "code"), REFUSALS)
async def test_a_permanent_refusal_causes_a_failover_and_an_alarm(
    broker: Broker, status: int, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = refusals(code)
    async with (
        providing(refusing(status)) as one,
        providing(saying("other")) as two,
        producing(broker, config=config(one.url, two.url), retry=QUICK),
    ):
        events = await answered(broker, ask("g1", "m"))
    assert kinds(events) == ["started", "notice failover", "delta", "usage", "completed"]
    assert text_of(events) == "other"
    assert (len(one.asked), len(two.asked)) == (1, 1)
    assert refusals(code) == counted + 1
    assert "upstream refused" in capsys.readouterr().out


async def test_an_exhausted_quota_causes_a_failover_without_retry(broker: Broker) -> None:
    body = b'{"error": {"message": "no quota", "type": "insufficient_quota", "code": "insufficient_quota"}}'
    spent = Replay([body], status=429, headers={"content-type": "application/json"})
    async with (
        providing(spent) as one,
        providing(saying("other")) as two,
        producing(broker, config=config(one.url, two.url), retry=QUICK),
    ):
        assert text_of(await answered(broker, ask("g1", "m"))) == "other"
    assert len(one.asked) == 1


@pytest.mark.parametrize(("status", "code"), REFUSALS)
async def test_without_another_candidate_a_refusal_ends_it_with_its_own_code(
    broker: Broker, status: int, code: str
) -> None:
    async with providing(refusing(status)) as one, providing(saying("never")) as two:
        candidates = ["p0/m", {"model": "p1/m", "failover": False}]
        setup = config(one.url, two.url, alias={"candidates": candidates})
        async with producing(broker, config=setup, retry=QUICK):
            events = await answered(broker, ask("g1", "m"))
    assert kinds(events) == ["started", "failed"]
    assert isinstance(events[-1], Failed)
    assert (events[-1].code, events[-1].upstream_status, events[-1].recoverable) == (code, status, False)
    assert (len(one.asked), len(two.asked)) == (1, 0)


async def test_a_refused_model_named_only_by_the_caller_raises_no_alarm(broker: Broker) -> None:
    counted = refusals("upstream_not_found")
    async with providing(refusing(404)) as provider, producing(broker, config=config(provider.url)):
        assert code_of(await answered(broker, ask("g1", "p0/made-up"))) == "upstream_not_found"
    assert refusals("upstream_not_found") == counted
