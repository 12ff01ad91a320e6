"""Test circuits: failures of a model, a provider or a tenant, and failures that do not count."""

import msgspec
import pytest

from schemas.requests import RequestDeadlines
from services.kit.jetstream.broker import Broker
from services.producer.core.deadlines import Deadlines
from tests.support.openai_answers import ONCE, answered, code_of, config, refusing, saying, silent
from tests.support.producer_worker import ask, ended_log, enqueue, producing, text_of
from tests.support.provider_server import Replay, providing, unlistening_port


async def test_an_open_model_circuit_does_not_affect_other_models_of_its_provider(broker: Broker) -> None:
    async with (
        providing(refusing(500)) as provider,
        producing(broker, config=config(provider.url), retry=ONCE, circuit=(2, 1_000.0)),
    ):
        for number in range(2):
            assert code_of(await answered(broker, ask(f"g{number}", "p0/broken"))) == "upstream_error"
        provider.replay = saying("fine")
        assert code_of(await answered(broker, ask("g2", "p0/broken"))) == "upstream_circuit_open"
        assert text_of(await answered(broker, ask("g3", "p0/other"))) == "fine"


@pytest.mark.parametrize(
    ("replay", "code"),
    [
        (Replay([b"data: {not json\n\n"]), "upstream_malformed"),
        (
            Replay(
                [b'{"error": {"message": "this model\'s maximum context length is 5 tokens"}}'],
                status=400,
                headers={"content-type": "application/json"},
            ),
            "context_length_exceeded",
        ),
    ],
)
async def test_failures_caused_by_request_or_answer_open_no_circuit(broker: Broker, replay: Replay, code: str) -> None:
    async with (
        providing(replay) as provider,
        producing(broker, config=config(provider.url), retry=ONCE, circuit=(2, 1_000.0)),
    ):
        for number in range(5):
            assert code_of(await answered(broker, ask(f"g{number}", "m"))) == code
        provider.replay = saying("fine")
        assert text_of(await answered(broker, ask("g9", "m"))) == "fine"


async def test_a_deadline_that_the_caller_shortened_opens_no_circuit_and_a_configured_one_does(
    broker: Broker,
) -> None:
    hurried = RequestDeadlines(first_token=5)
    async with (
        providing(silent()) as provider,
        producing(
            broker, config=config(provider.url), retry=ONCE, circuit=(2, 1_000.0), deadlines=Deadlines(first_token=5.5)
        ),
    ):
        impatient = [ask(f"hurried{n}", "m", deadlines=hurried) for n in range(5)]
        for request in impatient:
            await enqueue(broker, request)
        for request in impatient:
            assert code_of(await ended_log(broker, request)) == "deadline_first_token"
        patient = [ask(f"patient{n}", "m") for n in range(2)]
        for request in patient:
            await enqueue(broker, request)
        for request in patient:
            assert code_of(await ended_log(broker, request)) == "deadline_first_token"
        assert code_of(await answered(broker, ask("g9", "m"))) == "upstream_circuit_open"


async def test_failing_requests_of_one_tenant_block_no_other_tenant(broker: Broker) -> None:
    async with (
        providing(refusing(500)) as provider,
        producing(broker, config=config(provider.url), retry=ONCE, circuit=(2, 1_000.0)),
    ):
        for number in range(2):
            await answered(broker, ask(f"g{number}", "m"))
        assert code_of(await answered(broker, ask("g2", "m"))) == "upstream_circuit_open"
        provider.replay = saying("fine")
        other = msgspec.structs.replace(ask("g3", "m"), tenant="other")
        assert text_of(await answered(broker, other)) == "fine"


async def test_connection_failures_open_the_circuit_for_all_models_of_a_provider(broker: Broker) -> None:
    async with unlistening_port() as port:
        setup = config(f"http://127.0.0.1:{port}")
        async with producing(broker, config=setup, retry=ONCE, circuit=(2, 1_000.0)):
            for model in ("p0/one", "p0/two"):
                assert code_of(await answered(broker, ask(model.replace("/", "-"), model))) == "upstream_unreachable"
            assert code_of(await answered(broker, ask("g9", "p0/three"))) == "upstream_circuit_open"
