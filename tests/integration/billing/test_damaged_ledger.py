"""Test billing with a damaged database: it stops with one line of advice and does not wait."""

import os
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from services.billing.adapters.database import migrate, open_engine
from services.billing.database_url import database_url
from services.billing.errors import LedgerUnusable
from services.kit.jetstream.broker import Broker
from services.kit.lifecycle import EXIT_UNUSABLE
from tests.conftest import NatsServer, eventually
from tests.support.billing_process import Process, append_history, sqlite


def _garbage(path: Path) -> None:
    path.write_bytes(os.urandom(20_000))


def _pages_overwritten(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4_096)
        file.write(b"\x5a" * (size - 8_192))


def _cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")


def _something_else(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_garbage, "not a database; put a backup"),
        (_pages_overwritten, "malformed; put a backup|damaged .*; put a backup"),
        (_cut_off, "malformed; put a backup|damaged .*; put a backup"),
        (_newer, "'9999'.*; run the version of Tailrace that created it"),
        (_something_else, "another application's database, with 'recipes' in it; name another file"),
    ],
)
async def test_a_database_that_cannot_be_used_ends_billing_with_advice(
    own_nats: NatsServer, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    url = sqlite(tmp_path)
    spoil(tmp_path / "billing.db")
    with pytest.raises(LedgerUnusable, match=words):
        async with open_engine(database_url(url)) as engine:
            await migrate(engine)
    process = Process(own_nats.url, tmp_path, url)
    done = subprocess.run(process.command, env=process.env, capture_output=True, text=True, timeout=60, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == EXIT_UNUSABLE
    assert last.startswith("tailrace: the billing database cannot be used: ")
    assert "Traceback" not in done.stderr


async def test_a_database_that_cannot_be_written_ends_billing_with_advice(tmp_path: Path) -> None:
    sqlite(tmp_path)
    url = f"sqlite:///file:{tmp_path}/billing.db?mode=ro&uri=true"
    with pytest.raises(LedgerUnusable, match="let billing write the file and its folder"):
        async with open_engine(database_url(url)) as engine:
            await migrate(engine)


async def test_a_database_that_is_damaged_while_billing_runs_ends_it(own_nats: NatsServer, tmp_path: Path) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        process = await Process(own_nats.url, tmp_path, sqlite(tmp_path)).start()
        try:
            await append_history(broker, "gen_1")
            for path in tmp_path.glob("billing.db*"):
                path.write_bytes(os.urandom(path.stat().st_size))
            await append_history(broker, "gen_2")
            assert process.process is not None
            await eventually(lambda: process.process and process.process.poll() is not None, timeout=30)
            assert process.process.returncode == EXIT_UNUSABLE
        finally:
            process.kill()
    assert "put a backup in its place" in process.log.read_text().strip().splitlines()[-1]
