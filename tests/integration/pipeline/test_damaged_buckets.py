"""Test damage to the broker's other streams under running services: new answers are started, read and billed."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from schemas.topology import Topology
from services.kit.jetstream.broker import Broker
from services.standalone.store import drop_indexes, set_aside_unreadable
from tests.conftest import NatsServer, eventually
from tests.support.billing_process import running, sqlite
from tests.support.delivery_server import Stage, delivering
from tests.support.producer_worker import producing
from tests.support.store_damage import DAMAGES, stream_folder

KINDS = ("block-overwritten", "block-truncated", "block-missing", "index-garbage", "meta-garbage", "stream-missing")
STREAMS = ("KV_generations", "KV_registry", "DELIVERED", "CONSUMERS")
WISH = {
    "model": "scripted/story",
    "messages": [{"role": "user", "content": "rivers"}],
    "params": {"tokens": 5, "tokens_per_second": 500},
}


def damage(server: NatsServer, kind: str, stream: str) -> None:
    server.stop()
    folder = stream_folder(server.folder, stream)
    if list((folder / "msgs").glob("*.blk")) or not kind.startswith("block"):
        DAMAGES[kind](folder)
    drop_indexes(server.folder)  # as `tailrace up` does
    set_aside_unreadable(server.folder, server.folder / "damaged")
    server.start()


async def answered(stage: Stage) -> str:
    """Ask until it is accepted, wait for the end, and return the generation."""

    async def asked() -> str | None:
        answer = await stage.http.post(f"{stage.url}/v1/sessions/s/generations", json=WISH)
        return str(answer.json()["generation"]) if answer.status_code == 202 else None

    generation: str = await eventually(asked, timeout=30, interval=0.3)

    async def ended() -> bool:
        found: dict[str, Any] = (await stage.http.get(f"{stage.url}/v1/sessions/s/generations/{generation}")).json()
        return found.get("state") == "completed"

    await eventually(ended, timeout=20, interval=0.1)
    return generation


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("kind", KINDS)
async def test_new_answers_are_produced_and_billed_after_damage(
    own_nats: NatsServer, tmp_path: Path, stream: str, kind: str
) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.keep(Topology())
        async with delivering(own_nats.url) as stage, producing(broker), running(broker, sqlite(tmp_path)) as run:
            before = [await answered(stage) for _ in range(3)]
            await asyncio.to_thread(damage, own_nats, kind, stream)
            after = [await answered(stage) for _ in range(2)]

            async def billed() -> bool:
                found = [await run.reports.generation("default", name) for name in (*before, *after)]
                return all(g is not None and g.ended for g in found)

            await eventually(billed, timeout=20)
