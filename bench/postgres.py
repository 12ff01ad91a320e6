"""A separate PostgreSQL server for a measurement, in a temporary folder, with default durability."""

import os
import pwd
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Final, Self

import psutil

from bench.processes import free_port

__all__ = ["CannotStart", "Postgres"]

START_SECONDS: Final = 30.0


class CannotStart(Exception):
    """PostgreSQL is not installed, or did not start."""


class Postgres:
    """A server on a loopback port; ``url`` is an empty database."""

    def __init__(self, folder: Path) -> None:
        self._programs = _programs()
        self._folder = folder / "postgres"
        self._folder.mkdir()
        self._identity: dict[str, Any] = {}
        if os.geteuid() == 0:  # the server refuses to run as root
            user = pwd.getpwnam("postgres")
            self._identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            folder.chmod(0o755)
        self.port = free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def __enter__(self) -> Self:
        data = str(self._folder / "data")
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": self._folder}
        initdb = [str(self._programs / "initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        subprocess.run(initdb, check=True, **quiet, **self._identity)
        options = ["listen_addresses=127.0.0.1", "unix_socket_directories="]
        command = [str(self._programs / "postgres"), "-D", data, "-p", str(self.port)]
        command += [part for option in options for part in ("-c", option)]
        self._process = subprocess.Popen(command, **quiet, **self._identity)
        self._server = psutil.Process(self._process.pid)
        self._wait()
        return self

    def _wait(self) -> None:
        ready = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(ready, check=False).returncode != 0:
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.__exit__()
                raise CannotStart("PostgreSQL did not start")
            time.sleep(0.05)

    def __exit__(self, *_error: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def cpu(self) -> float:
        """Return the processor seconds of the server's running processes."""
        spent = 0.0
        for process in [self._server, *self._server.children(recursive=True)]:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            spent += times.user + times.system
        return spent


def _programs() -> Path:
    """Return the folder of PostgreSQL's programs, the newest version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[4]))
    on_path = shutil.which("postgres")
    if not found and not on_path:
        raise CannotStart("PostgreSQL is not installed")
    return found[-1].parent if found else Path(str(on_path)).resolve().parent
