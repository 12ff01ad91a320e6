"""The command line against a delivery that asks for credentials, and services that refuse to start without any."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bench.processes import free_port
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer
from tests.support.credentials import ADMIN, guarded
from tests.support.delivery_server import Stage
from tests.support.service_processes import REPOSITORY, clean_environment


@pytest.fixture
async def stage(broker: Broker, nats_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    async with guarded(nats_url, tmp_path) as running:
        yield running


async def tailrace(stage: Stage | None, *argv: str, key: str | None = ADMIN.text) -> subprocess.CompletedProcess[str]:
    env = clean_environment(**({"TAILRACE_KEY": key} if key else {}), **({"TAILRACE_URL": stage.url} if stage else {}))
    command = [sys.executable, "-m", "services.standalone.cli", *argv]
    return await asyncio.to_thread(
        subprocess.run, command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=60, check=False
    )


async def test_a_key_is_made_used_listed_and_revoked(stage: Stage) -> None:
    made = await tailrace(stage, "keys", "create", "--scope", "read", "--name", "reader", "--tenant", "acme", "--json")
    assert made.returncode == 0, made.stderr
    key = json.loads(made.stdout)
    assert (await tailrace(stage, "sessions", key=key["key"])).returncode == 0
    refused = await tailrace(stage, "keys", "list", key=key["key"])
    assert refused.returncode == 1
    assert "admin" in refused.stderr
    listed = await tailrace(stage, "keys", "list")
    assert "reader" in listed.stdout
    assert key["key"] not in listed.stdout
    assert (await tailrace(stage, "keys", "revoke", key["id"])).returncode == 0
    after = await tailrace(stage, "sessions", key=key["key"])
    assert after.returncode == 1
    assert "not valid" in after.stderr
    assert (await tailrace(stage, "keys", "revoke", key["id"])).returncode == 1


async def test_without_a_key_the_command_reports_missing_credentials(stage: Stage) -> None:
    done = await tailrace(stage, "sessions", key=None)
    assert done.returncode == 1
    assert "credentials" in done.stderr


async def test_the_bootstrap_key_fits_its_setting() -> None:
    done = await tailrace(None, "keys", "bootstrap", key=None)
    key, setting = done.stdout.split()
    name, _, value = setting.partition("=")
    assert name == "TAILRACE_ADMIN_KEY_HASH"
    assert value.split(".")[0] == key.split("_")[1]
    assert key.split("_", 2)[2] not in setting


@pytest.mark.parametrize("service", ["delivery", "billing"])
async def test_a_service_on_a_public_address_does_not_start_without_credentials(
    own_nats: NatsServer, tmp_path: Path, service: str
) -> None:
    name = service.upper()
    env = clean_environment(
        TAILRACE_NATS_URL=own_nats.url,
        TAILRACE_DATA=str(tmp_path),
        **{f"TAILRACE_{name}_HOST": "0.0.0.0", f"TAILRACE_{name}_PORT": str(free_port())},
    )
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", f"services.{service}"],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "TAILRACE_ADMIN_KEY_HASH" in done.stderr
    assert "0.0.0.0" in done.stderr
