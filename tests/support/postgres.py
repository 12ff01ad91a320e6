"""A real PostgreSQL for tests: an own server in a temporary folder, or the one that TAILRACE_TEST_POSTGRES_URL names.

``postgres_url`` is the address of a migrated database without content, made for one test and dropped after it.
"""

import asyncio
import atexit
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from bench.processes import free_port
from tests.conftest import require
from tests.support.migrated_database import elsewhere, migrated


class PostgresServer:
    """A server on a loopback port, without durability; can be stopped and started again."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs = programs
        self.folder = folder
        self.port = free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self.process: subprocess.Popen[bytes] | None = None
        # The server refuses to run as root.
        self.identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            self.identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)

    def create(self) -> "PostgresServer":
        subprocess.run(
            [self.programs / "initdb", "-D", self.folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "-N"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
            **self.identity,
        )
        return self

    def start(self) -> "PostgresServer":
        options = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off", "max_connections=50"]
        self.process = subprocess.Popen(
            [self.programs / "postgres", "-D", self.folder / "data", "-p", str(self.port)]
            + [part for option in options for part in ("-c", option)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            **self.identity,
        )
        self._wait()
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        ready = [self.programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while time.monotonic() < deadline:
            if subprocess.run(ready, check=False).returncode == 0:
                return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError("PostgreSQL did not start")

    def stop(self) -> None:
        """Stop at once: connections are cut, committed data stays."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
            self.process = None


def programs() -> Path:
    """Return the folder of PostgreSQL's programs, the newest version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[4]))
    on_path = shutil.which("postgres")
    folder = found[-1].parent if found else Path(on_path).resolve().parent if on_path else None
    require(folder, "PostgreSQL is not installed and TAILRACE_TEST_POSTGRES_URL is not set")
    assert folder is not None
    return folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A server of this session's own, which a test may stop if it starts it again."""
    folder = Path(tempfile.mkdtemp(prefix="tailrace-postgres-"))
    server = PostgresServer(programs(), folder).create().start()
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


async def _administer(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@cache
def _template(admin: str) -> str:
    """Return the name of a migrated database that others are copied from; it is dropped with the process."""
    name = f"tailrace_template_{secrets.token_hex(6)}"
    elsewhere(_administer(admin, f"CREATE DATABASE {name}"))
    elsewhere(migrated(f"{admin.rsplit('/', 1)[0]}/{name}"))
    if os.environ.get("TAILRACE_TEST_POSTGRES_URL"):
        atexit.register(lambda: asyncio.run(_administer(admin, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")))
    return name


@asynccontextmanager
async def created(request: pytest.FixtureRequest, *, empty: bool = False) -> AsyncIterator[str]:
    """Yield the address of a database for one test; ``empty``: it has no tables."""
    admin = os.environ.get("TAILRACE_TEST_POSTGRES_URL") or request.getfixturevalue("postgres_server").url
    name = f"tailrace_{secrets.token_hex(6)}"
    await _administer(admin, f"CREATE DATABASE {name}" + ("" if empty else f" TEMPLATE {_template(admin)}"))
    yield admin.rsplit("/", 1)[0] + "/" + name
    await _administer(admin, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture
async def postgres_url(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    async with created(request) as url:
        yield url
