"""A request that is repeated under its key after a producer has taken it."""

import asyncio
from typing import Any

import httpx
import msgspec
import pytest

from schemas.subjects import lane_of, request_subject
from services.delivery.app import Replica
from services.delivery.requests.intake import GenerationRequest
from services.delivery.settings import Settings
from services.kit.auth.principal import Principal
from services.kit.clock import SystemClock
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.errors import APIError
from services.kit.problem import Problem
from services.kit.settings import Shared
from tests.conftest import eventually
from tests.support.delivery_server import Stage, delivering
from tests.support.producer_worker import producing

WISH = {
    "model": "scripted/story",
    "messages": [{"role": "user", "content": "rivers"}],
    "params": {"tokens": 5, "tokens_per_second": 500},
}


async def ask(stage: Stage, wish: dict[str, Any]) -> httpx.Response:
    path = f"{stage.url}/v1/sessions/s/generations"
    return await stage.http.post(path, json=wish, headers={"Idempotency-Key": "once"})


async def test_a_request_repeated_after_its_end_is_answered_with_the_same_generation(
    broker: Broker, nats_url: str
) -> None:
    async with delivering(nats_url) as stage, producing(broker):
        first = await ask(stage, WISH)
        path = f"{stage.url}/v1/sessions/s"

        async def record() -> dict[str, Any] | None:
            found: dict[str, Any] = (await stage.http.get(path)).json()["generations"][0]
            return found if found["state"] == "completed" else None

        assert (await eventually(record))["generation"] == first.json()["generation"]
        again = await ask(stage, WISH)
        assert again.status_code == 202, again.text
        assert again.headers["idempotency-replayed"] == "true"
        assert again.json()["generation"] == first.json()["generation"]
        other = await ask(stage, WISH | {"priority": "batch"})
        assert other.json()["type"] == "urn:tailrace:problem:idempotency-conflict"


class Taking:
    """An intake whose budgets can be made to wait and refuse."""

    def __init__(self, broker: Broker) -> None:
        clock = SystemClock()
        replica = Replica(broker, clock, Shared(), Settings())
        self.lookups = replica.lookups
        self.admission = replica.admission
        self.intake = replica.intake
        self.broker = broker

    async def accept(self) -> str:
        wish = msgspec.convert(WISH, GenerationRequest)
        return (await self.intake.accept(Principal(tenant="default"), "s", wish, "once"))[0]

    async def is_queued(self, generation: str) -> bool:
        return await self.broker.holds("REQUESTS", request_subject(lane_of("default", "interactive"), generation))

    async def is_known(self, generation: str) -> bool:
        return await self.lookups.get("default", "s", generation) is not None


@pytest.fixture
def taking(broker: Broker) -> Taking:
    return Taking(broker)


async def test_a_late_failure_of_the_first_attempt_does_not_remove_the_request_queued_by_its_repeat(
    taking: Taking, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, fails = asyncio.Event(), asyncio.Event()

    async def late(*_: object, **__: object) -> None:
        if not asked.is_set():
            asked.set()
            await fails.wait()
            raise Problem(503, "billing does not answer")

    monkeypatch.setattr(taking.admission, "reserve", late)
    first = asyncio.create_task(taking.accept())
    await asked.wait()
    generation = await taking.accept()
    fails.set()
    with pytest.raises(Problem):
        await first
    assert await taking.is_queued(generation)
    assert await taking.is_known(generation)


async def test_a_failed_attempt_without_a_repeat_is_undone(taking: Taking, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*_: object, **__: object) -> None:
        raise Problem(402, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(taking.admission, "reserve", refused)
        with pytest.raises(Problem):
            await taking.accept()
    assert await taking.lookups.of_session("default", "s") == []
    generation = await taking.accept()
    assert await taking.is_queued(generation)
    assert await taking.is_known(generation)


async def test_a_repeat_of_a_withdrawn_first_attempt_is_not_accepted(
    taking: Taking, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def exists(*_: object) -> None:
        return None

    monkeypatch.setattr(taking.lookups, "create", exists)
    with pytest.raises(BrokerUnavailable, match="ask again"):
        await taking.accept()


async def test_a_duplicate_error_of_the_queue_without_a_stored_request_is_an_error(
    taking: Taking, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = broker.publish_stored

    async def refuse(subject: str, data: bytes, **more: Any) -> int:
        if not subject.startswith("requests."):
            return await stored(subject, data, **more)
        raise APIError(code=503, err_code=10077, description="maximum messages per subject exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(broker, "publish_stored", refuse)
        with pytest.raises(BrokerUnavailable, match="not in the queue yet"):
            await taking.accept()
    generation = await taking.accept()
    assert await taking.is_queued(generation)
    assert await taking.accept() == generation
