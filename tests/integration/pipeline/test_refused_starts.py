"""Test refused starts without an acknowledgement of the broker: they are withdrawn completely."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from schemas.events import Cancelled, Completed
from schemas.subjects import request_subject
from services.delivery.requests import withdrawals
from services.delivery.requests.intake import GenerationRequest
from services.kit.auth.principal import Principal
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.storage import Storage
from services.kit.problem import Problem
from tests.conftest import NatsServer, eventually
from tests.integration.pipeline.test_repeated_starts import WISH, Taking
from tests.support.delivery_server import metric
from tests.support.producer_worker import ask, ended_log, producing

Stored = Callable[..., Any]


@pytest.fixture
def taking(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Taking:
    monkeypatch.setattr(withdrawals, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(withdrawals, "LATER_SECONDS", 0.5)
    return Taking(broker)


async def start(taking: Taking, key: str | None = None, **params: object) -> str:
    wish = msgspec.convert(WISH | {"params": WISH["params"] | params}, GenerationRequest)  # type: ignore[operator]
    return (await taking.intake.accept(Principal(tenant="default"), "s", wish, key))[0]


def losing_acknowledgements(stored: Stored, prefix: str, *, stores: bool) -> Stored:
    """Return a variant of ``stored`` that loses the acknowledgements for some subjects, whether stored or not."""

    async def publish(subject: str, data: bytes, **more: Any) -> Any:
        if not subject.startswith(prefix):
            return await stored(subject, data, **more)
        if stores:
            await stored(subject, data, **more)
        raise BrokerUnavailable("no acknowledgement")

    return publish


async def is_gone(taking: Taking) -> bool:
    waiting = await taking.broker.count("REQUESTS", "requests.>")
    return waiting == 0 and await taking.lookups.of_session("default", "s") == []


@pytest.mark.parametrize("stores", [True, False])
async def test_a_start_without_a_queue_acknowledgement_is_undone(
    taking: Taking, monkeypatch: pytest.MonkeyPatch, stores: bool
) -> None:
    with monkeypatch.context() as patch:
        lost = losing_acknowledgements(taking.broker.publish_stored, "requests.", stores=stores)
        patch.setattr(taking.broker, "publish_stored", lost)
        with pytest.raises(BrokerUnavailable):
            await start(taking)
        assert len(await taking.lookups.of_session("default", "s")) == 1
    await eventually(lambda: is_gone(taking))


@pytest.mark.parametrize("stores", [True, False])
async def test_a_start_without_a_record_acknowledgement_is_undone(
    taking: Taking, monkeypatch: pytest.MonkeyPatch, stores: bool
) -> None:
    create = taking.lookups.create

    async def unknown(record: Any) -> None:
        if stores:
            await create(record)
        raise BrokerUnavailable("no acknowledgement")

    monkeypatch.setattr(taking.lookups, "create", unknown)
    with pytest.raises(BrokerUnavailable):
        await start(taking)
    await eventually(lambda: is_gone(taking))


async def test_a_withdrawn_start_that_a_producer_already_runs_is_cancelled(
    taking: Taking, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(withdrawals, "PAUSE_SECONDS", 0.5)
    async with producing(broker) as producer:
        with monkeypatch.context() as patch:
            lost = losing_acknowledgements(broker.publish_stored, "requests.", stores=True)
            patch.setattr(broker, "publish_stored", lost)
            with pytest.raises(BrokerUnavailable):
                await start(taking, tokens=3_000, tokens_per_second=50)
        (relay,) = await eventually(lambda: list(producer.running.values()))
        events = await ended_log(broker, ask(relay.request.generation))
    assert isinstance(events[-1], Cancelled)


async def test_a_start_repeated_by_the_client_is_not_withdrawn(taking: Taking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(withdrawals, "PAUSE_SECONDS", 0.5)
    before = metric("tailrace_delivery_withdrawn_total", outcome="withdrawn")
    with monkeypatch.context() as patch:
        lost = losing_acknowledgements(taking.broker.publish_stored, "requests.", stores=True)
        patch.setattr(taking.broker, "publish_stored", lost)
        with pytest.raises(BrokerUnavailable):
            await start(taking, "once")
    generation = await start(taking, "once")
    await eventually(lambda: not taking.intake._withdrawals._waiting)
    assert await taking.is_known(generation)
    assert await taking.broker.holds("REQUESTS", request_subject("default", generation))
    assert metric("tailrace_delivery_withdrawn_total", outcome="withdrawn") == before


async def test_an_answer_whose_repeat_was_accepted_is_not_cancelled(
    taking: Taking, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(withdrawals, "PAUSE_SECONDS", 0.5)
    async with producing(broker) as producer:
        with monkeypatch.context() as patch:
            lost = losing_acknowledgements(broker.publish_stored, "requests.", stores=True)
            patch.setattr(broker, "publish_stored", lost)
            with pytest.raises(BrokerUnavailable):
                await start(taking, "once", tokens=150, tokens_per_second=50)
        (relay,) = await eventually(lambda: list(producer.running.values()))
        assert await start(taking, "once", tokens=150, tokens_per_second=50) == relay.request.generation
        events = await ended_log(broker, ask(relay.request.generation))
    assert isinstance(events[-1], Completed)
    assert not taking.intake._withdrawals._waiting, "the check after LATER_SECONDS came before the end"


async def test_nothing_is_begun_while_the_broker_stores_nothing(
    taking: Taking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taking.intake._storage, "stores", lambda: False)
    with pytest.raises(Problem) as refused:
        await start(taking)
    assert (refused.value.status, refused.value.details.type) == (503, "urn:tailrace:problem:log-refuses")
    assert await is_gone(taking)


async def test_storage_failures_are_announced_to_other_services(own_nats: NatsServer) -> None:
    async with Broker.connect(own_nats.url, "one") as one, Broker.connect(own_nats.url, "two") as two:
        await one.js.add_stream(name="KV_generations", subjects=["$KV.generations.>"])
        stuck = False
        first, second = Storage(one, "producer", lambda: stuck), Storage(two, "billing")
        await second.probe()
        assert not second.stores(), "there is no bucket for what it writes"
        await one.js.add_stream(name="KV_registry", subjects=["$KV.registry.>"])
        await second.probe()
        await first.probe()
        assert first.stores()
        assert second.stores()
        stuck = True
        await first.probe()
        await eventually(lambda: not second.stores())
        assert not first.stores()
