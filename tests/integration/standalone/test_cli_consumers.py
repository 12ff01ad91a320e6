"""``tailrace consumers`` against a real delivery."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator

import pytest

from services.kit.jetstream.broker import Broker
from tests.conftest import eventually
from tests.integration.standalone.test_cli import command, environment
from tests.support.consumer_server import Service, Stage, consuming
from tests.support.delivery_server import Log, keys, story


@pytest.fixture
async def stage(nats_url: str, broker: Broker) -> AsyncIterator[Stage]:
    async with consuming(nats_url) as running:
        yield running


async def tailrace(stage: Stage, *argv: str) -> tuple[int, str, str]:
    """Run a command; return its exit code, standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        *command("consumers", *argv),
        env=environment(TAILRACE_URL=stage.url),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_consumer_is_created_read_paused_and_removed(stage: Stage, broker: Broker) -> None:
    await Log(broker).append(*story("g1", 4))
    wish = ("--session", "s", "--type", "started", "--type", "completed", "--ack-wait", "5", "--json")
    code, out, _ = await tailrace(stage, "create", "mailer", *wish)
    assert code == 0
    created = json.loads(out)
    assert (created["session"], created["types"], created["ack_wait"]) == ("s", ["started", "completed"], 5)
    code, out, _ = await tailrace(stage, "events", "mailer", "--drain")
    assert code == 0
    events = [json.loads(line)["event"] for line in out.splitlines()]
    assert keys(events) == [("g1", 0), ("g1", 6)]
    assert (await Service(stage, "mailer").view())["in_flight"] == 0
    code, out, _ = await tailrace(stage, "list")
    assert out.splitlines()[1].split() == ["mailer", "s", "started,", "completed", "0", "0", "0", "no"]
    assert "yes" in (await tailrace(stage, "pause", "mailer"))[1]
    assert json.loads((await tailrace(stage, "resume", "mailer", "--json"))[1])["paused"] is False
    assert "max_deliver" in (await tailrace(stage, "show", "mailer"))[1]
    assert (await tailrace(stage, "delete", "mailer"))[0] == 0
    code, _, err = await tailrace(stage, "show", "mailer")
    assert (code, "there is no consumer 'mailer'" in err) == (1, True)
    assert "no consumers" in (await tailrace(stage, "list"))[2]


async def test_dead_events_are_listed_and_resent(stage: Stage, broker: Broker) -> None:
    await Log(broker).append(*story("g1", 0)[:1])
    service = await Service(stage).created(ack_wait=0.2, max_deliver=1)

    async def died() -> bool:
        await service.batch(wait=1)
        return bool(await service.dead())

    await eventually(died)
    (dead,) = json.loads((await tailrace(stage, "dead", "svc", "--json"))[1])["events"]
    assert dead["id"] in (await tailrace(stage, "dead", "svc"))[1]
    assert (await tailrace(stage, "resend", "svc", dead["id"]))[0] == 0
    _, out, _ = await tailrace(stage, "events", "svc", "--drain")
    assert [json.loads(line)["cursor"] for line in out.splitlines()] == [dead["id"]]


async def test_invalid_arguments_are_reported(stage: Stage) -> None:
    assert (await tailrace(stage, "create", "a.b"))[0] == 2
    code, _, err = await tailrace(stage, "create", "svc", "--type", "nonsense")
    assert (code, "nonsense" in err) == (1, True)
