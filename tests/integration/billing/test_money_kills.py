"""Test that money equals an independent count while two billing processes are killed at random."""

import asyncio
import random
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from services.billing.adapters.database import open_engine, reading
from services.billing.adapters.tables import GENERATIONS, LEDGER
from services.billing.database_url import database_url
from services.kit.jetstream.broker import Broker
from tests.conftest import eventually
from tests.support.billing_process import Process, Scenario, sqlite, write
from tests.support.postgres import postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]
MILLION = Decimal(1_000_000)
INPUT = 7
EXPORTED = 3


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return sqlite(tmp_path) if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))


@pytest.fixture
async def processes(nats_url: str, broker: Broker, database: str, tmp_path: Path) -> AsyncIterator[list[Process]]:
    made = [Process(nats_url, tmp_path, database) for _ in range(2)]
    yield made
    for process in made:
        process.kill()


def prices(output: int) -> str:
    head = 'currency = "USD"\n[[price]]\nprovider = "openai"\nmodel = "gpt"\nfrom = 2020-01-01\n'
    return f"{head}input = 2\noutput = {output}\n"


async def send(process: Process, method: str, path: str, body: str, media: str) -> None:
    """Send until one process has answered; the request may be executed twice."""

    async def sent() -> bool:
        async with httpx.AsyncClient(base_url=process.url, timeout=5) as client:
            try:
                answer = await client.request(method, path, content=body, headers={"content-type": media})
            except httpx.TransportError:
                return False
        assert answer.status_code in (200, 503), answer.text
        return answer.status_code == 200

    await eventually(sent, timeout=30, interval=0.05)


def independent(scenario: Scenario, rate: int, exported: list[str]) -> dict[str, Decimal]:
    """Return the cost of each generation, computed without billing's code."""
    found = {}
    for name, (_, counted, reported) in scenario.expected.items():
        output = counted + EXPORTED if name in exported else counted if reported is None else reported
        found[name] = (INPUT * 2 + output * rate) / MILLION
    return found


async def entered(url: str) -> tuple[dict[str, Decimal], dict[str, Decimal]]:
    """Return the sums of ledger entries and of the generations' amounts."""
    async with open_engine(database_url(url)) as engine, reading(engine) as connection:
        columns = (LEDGER.c.generation, sa.func.sum(LEDGER.c.amount))
        entries = {r[0]: r[1] for r in await connection.execute(sa.select(*columns).group_by(LEDGER.c.generation))}
        rows = await connection.execute(sa.select(GENERATIONS.c.generation, GENERATIONS.c.amount))
        return entries, {r[0]: r[1] for r in rows}


@pytest.mark.parametrize("seed", [1, 2])
async def test_money_equals_an_independent_count(
    processes: list[Process], broker: Broker, database: str, seed: int
) -> None:
    chance = random.Random(seed)
    scenario = Scenario(60 + seed, generations=80)
    # What did not complete is charged by its export only once its policy says so: those are left out here.
    complete = [name for name, (status, _, _) in scenario.expected.items() if status != "partial"]
    exported = chance.sample(complete, 15)
    rows = "".join(f"{name},{INPUT},{scenario.expected[name][1] + EXPORTED}\n" for name in exported)
    size = len(scenario.events) // 6 + 1
    await asyncio.gather(*(process.start() for process in processes))
    for step in range(6):
        await write(broker, scenario.events[step * size : (step + 1) * size])
        victim, other = chance.sample(processes, 2)
        if step in (1, 3, 4):
            await send(other, "PUT", "/v1/prices", prices(10 + step), "application/toml")
        if step in (2, 5):
            await send(other, "POST", "/v1/provider-usage", "generation,input,output\n" + rows, "text/csv")
        victim.kill()
        await victim.start()
    expected = independent(scenario, 14, exported)

    async def right() -> bool:
        return await entered(database) == (expected, expected)

    try:
        await eventually(right, timeout=40, interval=0.2)
    except AssertionError:
        assert await entered(database) == (expected, expected)
    assert [process.stop() for process in processes] == [0, 0]
