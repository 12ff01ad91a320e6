"""``python -m services.billing`` as a process: killed, stopped, started without its database."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from schemas.topology import Topology
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.billing_process import Process, Scenario, sqlite, write
from tests.support.postgres import PostgresServer, postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return sqlite(tmp_path) if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))


@pytest.fixture
async def process(nats_url: str, broker: Broker, database: str, tmp_path: Path) -> AsyncIterator[Process]:
    made = Process(nats_url, tmp_path, database)
    yield made
    made.kill()


async def totals(process: Process, query: str = "") -> dict[str, int]:
    answer = await process.get(f"/v1/usage{query}")
    if answer is None or answer.status_code != 200:
        return {}
    found: dict[str, int] = answer.json()["rows"][0]["totals"]
    return found


async def test_totals_are_exact_after_kills_mid_stream(process: Process, broker: Broker) -> None:
    scenario = Scenario(20, generations=120)
    steps = [scenario.events[start : start + 25] for start in range(0, len(scenario.events), 25)]
    await process.start()

    async def feed() -> None:
        for step in steps:
            await write(broker, step)
            await asyncio.sleep(0.02)  # spreads the writing over the kills

    feeding = asyncio.create_task(feed())
    for kill in range(3):

        async def some(kill: int = kill) -> bool:
            return (await totals(process)).get("counted_output", 0) > kill * 1_000

        await eventually(some, timeout=30)
        process.kill()
        await process.start()
    await feeding
    counted = sum(n for _, n, _ in scenario.expected.values())
    reported = sum(n or 0 for _, _, n in scenario.expected.values())

    async def complete() -> bool:
        found = await totals(process)
        partial = await totals(process, "?status=partial")
        return found.get("counted_output") == counted and partial.get("generations") == 30

    await eventually(complete, timeout=30)
    found = await totals(process)
    assert (found["generations"], found["output"], found["counted_output"]) == (120, reported, counted)
    for status in ("matched", "drift", "provider_missing"):
        assert (await totals(process, f"?status={status}"))["generations"] == 30
    assert process.stop() == 0


async def test_sigterm_ends_the_process_cleanly_and_releases_its_partitions(process: Process, broker: Broker) -> None:
    scenario = Scenario(21)
    await process.start()
    await write(broker, scenario.events)
    assert process.stop() == 0
    assert b"Traceback" not in process.log.read_bytes()
    await process.start()

    async def complete() -> bool:
        return (await totals(process)).get("generations") == len(scenario.expected)

    await eventually(complete)
    assert process.stop() == 0


async def test_readiness_follows_the_broker(own_nats: NatsServer, tmp_path: Path) -> None:
    process = Process(own_nats.url, tmp_path, sqlite(tmp_path))
    try:
        await process.start()
        own_nats.stop()

        async def unready() -> bool:
            answer = await process.get("/readyz")
            return answer is not None and answer.json()["checks"] == {"broker": False, "database": True, "log": True}

        await eventually(unready)
        own_nats.start()
        await eventually(process.ready)
        own_nats.stop()
        assert process.stop() == 0
        assert b"Traceback" not in process.log.read_bytes()
    finally:
        process.kill()


@pytest.mark.postgres
async def test_the_process_waits_for_a_database_that_is_not_yet_reachable(
    nats_url: str, broker: Broker, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    scenario = Scenario(22)
    await broker.apply(Topology())
    await write(broker, scenario.events)
    process = Process(nats_url, tmp_path, postgres_server.url)
    postgres_server.stop()
    try:
        start = asyncio.create_task(process.start())

        async def unready() -> bool:
            answer = await process.get("/readyz")
            return answer is not None and not answer.json()["checks"]["database"]

        await eventually(unready, timeout=30)
        usage = await process.get("/v1/usage")
        assert usage is not None
        assert usage.status_code == 503
        postgres_server.start()
        await start

        async def complete() -> bool:
            return (await totals(process)).get("generations") == len(scenario.expected)

        await eventually(complete, timeout=20)
        assert process.stop() == 0
    finally:
        process.kill()
        if postgres_server.process is None:
            postgres_server.start()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"database_url": "mysql://h/d"}, b"TAILRACE_BILLING_DATABASE_URL: database 'mysql' is not supported"),
        ({"grace": "-1", "batch": "many"}, b"TAILRACE_BILLING_GRACE"),
        ({"database_url": "sqlite:////proc/no/billing.db"}, b"/proc/no/billing.db cannot be created"),
        ({"colour": "blue"}, b"TAILRACE_BILLING_COLOUR: no such setting"),
    ],
)
async def test_invalid_settings_are_named_and_end_the_process_with_code_2(
    settings: dict[str, str], named: bytes, tmp_path: Path
) -> None:
    process = Process("nats://127.0.0.1:1", tmp_path, sqlite(tmp_path), **settings)
    ended = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.billing", env=process.env, stderr=asyncio.subprocess.PIPE
    )
    _out, error = await asyncio.wait_for(ended.communicate(), 30)
    assert ended.returncode == 2
    assert named in error
