"""A request that is repeated under its key after a producer has taken it."""

from typing import Any

import httpx

from services.kit.broker import Broker
from tests.conftest import eventually
from tests.delivery_stage import Stage, delivering
from tests.pipeline import producing

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
