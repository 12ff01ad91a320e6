"""The example that reads with plain nats-py prints accepted events and nothing else."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from schemas.events import Completed, Delta, Restarted
from schemas.topology import Topology
from services.kit.jetstream.broker import Broker
from tests.support.delivery_server import Log, keys, story

REPOSITORY = Path(__file__).parents[4]
EXAMPLE = REPOSITORY / "docs" / "examples" / "read_with_nats.py"


async def example(url: str, *argv: str) -> asyncio.subprocess.Process:
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = (sys.executable, str(EXAMPLE), *argv, "--url", url)
    return await asyncio.create_subprocess_exec(*command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


async def read(url: str, *argv: str) -> list[tuple[str, int]]:
    process = await example(url, "durable", *argv, "--until-empty")
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    return keys(json.loads(line) for line in out.splitlines())


async def disturbed(log: Log) -> None:
    """Write an answer with repeats, garbage, a takeover and late events of its first producer."""
    first = story("g1", 3)[:3]
    await log.append(*first, *first)
    await log.append_bytes("g1", b"no event")
    await log.append(Restarted(generation="g1", seq=3, epoch=2, reason="producer_lost"))
    await log.append(Delta(generation="g1", seq=4, text="zombie"), Delta(generation="g1", seq=4, epoch=2, text="new"))
    await log.append(Completed(generation="g1", seq=5, epoch=2, finish_reason="stop"))


async def test_a_durable_reader_prints_accepted_events_and_resumes_at_its_position(
    nats_url: str, broker: Broker
) -> None:
    await broker.apply(Topology(partitions=2))
    log = Log(broker, "s", Topology(partitions=2))
    await disturbed(log)
    run = story("g2", 4)
    await log.append(*run[:3])
    assert await read(nats_url, "one") == [*(("g1", n) for n in range(6)), *keys(run[:3])]
    await log.append(run[2], *run[3:])  # a repeat of what was read before the restart comes first
    assert await read(nats_url, "one") == keys(run[3:])
    assert await read(nats_url, "one") == []
    assert len(await read(nats_url, "two", "--tenant", "default")) == 6 + len(run)
    assert await read(nats_url, "three", "--tenant", "other") == []


async def test_a_live_reader_prints_accepted_events_at_once(nats_url: str, broker: Broker) -> None:
    run = story("g0", 2)
    await Log(broker).append(*run[:2])
    process = await example(nats_url, "live")
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(60):
            assert await process.stderr.readline() == b"listening\n"
            await Log(broker).append(run[1], *run[2:])
            await disturbed(Log(broker))
            lines = [json.loads(await process.stdout.readline()) for _ in range(len(run) - 2 + 6)]
    finally:
        process.kill()
        await process.wait()
    assert keys(lines) == [*keys(run[2:]), *(("g1", n) for n in range(6))]
