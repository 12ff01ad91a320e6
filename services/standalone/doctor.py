"""``tailrace doctor``: check this machine for problems that would prevent ``tailrace up`` from running."""

import importlib
import os
import platform
import resource
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from services.kit.http import PortTaken, check_port
from services.kit.settings import SettingsError, read_config
from services.standalone.disk import disk_use, human_bytes
from services.standalone.embedded import find_nats_server
from services.standalone.errors import EXIT_FAILED, EXIT_OK, CannotStart
from services.standalone.folder import holder_of
from services.standalone.options import data_option, json_option
from services.standalone.plan import PROVIDER_KEYS
from services.standalone.ports import PORTS, read_ports
from services.standalone.settings_check import overruled, wrong_settings
from services.standalone.terminal import Terminal, pretty

__all__ = ["doctor"]

_LOW_DISK: Final = 1024**3
_FILES: Final = 4_096


class Finding(NamedTuple):
    """The result of one check. ``level``: ``ok``, ``note`` (worth knowing), or ``problem`` (needs a change)."""

    level: str
    what: str
    text: str


@click.command()
@data_option
@click.option(
    "--config", type=click.Path(path_type=Path, dir_okay=False), envvar="TAILRACE_CONFIG", help="TOML file of settings."
)
@json_option
def doctor(data: Path, config: Path | None, as_json: bool) -> int:
    """Check this machine for problems that would prevent `tailrace up` from running, and print the remedies.

    It changes nothing. Exit codes: 0 no problem, 1 at least one problem.
    """
    terminal = Terminal()
    env = dict(os.environ) | ({"TAILRACE_CONFIG": str(config)} if config else {})
    findings = [finding for check in _checks(data, env) for finding in check()]
    if as_json:
        terminal.show(pretty({"findings": [finding._asdict() for finding in findings]}))
    else:
        for finding in findings:
            mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[finding.level]
            terminal.show(f"{mark}  {finding.what}: {finding.text}")
    return EXIT_FAILED if any(finding.level == "problem" for finding in findings) else EXIT_OK


def _checks(data: Path, env: dict[str, str]) -> list[Callable[[], Iterator[Finding]]]:
    return [
        _python,
        _nats_server,
        _runtime,
        _files,
        lambda: _folder(data),
        lambda: _database(data / "billing.db"),
        lambda: _ports(data, env),
        lambda: _settings(env),
        lambda: _keys(env),
    ]


def _python() -> Iterator[Finding]:
    text = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("ok" if sys.version_info >= (3, 11) else "problem", "Python", text)


def _nats_server() -> Iterator[Finding]:
    try:
        found = find_nats_server()
    except CannotStart as error:
        yield Finding("problem", "nats-server", str(error))
    else:
        yield Finding("ok", "nats-server", f"{found.version_text} ({found.path})")


def _runtime() -> Iterator[Finding]:
    """Check the C++ runtime, the one system library that a minimal image may lack."""
    try:
        importlib.import_module("greenlet")
    except ImportError as error:
        yield Finding("problem", "C++ runtime", f"{error}: install libstdc++ (Debian: apt install libstdc++6)")
    else:
        yield Finding("ok", "C++ runtime", "present")


def _files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FILES:
        advice = f"{soft} (ulimit -n): each client needs one; raise it to {_FILES} or more (the hard limit is {hard})"
        yield Finding("note", "open files", advice)
    else:
        yield Finding("ok", "open files", f"{soft} (ulimit -n)")


def _folder(data: Path) -> Iterator[Finding]:
    if not data.exists():
        parent = next(each for each in data.absolute().parents if each.exists())
        writable = os.access(parent, os.W_OK)
        text = f"{data} does not exist yet; {'it will be created' if writable else f'{parent} is not writable'}"
        yield Finding("ok" if writable else "problem", "data folder", text)
        return
    if not os.access(data, os.W_OK | os.X_OK):
        yield Finding("problem", "data folder", f"{data} is not writable by this user")
        return
    if data.stat().st_mode & 0o077:
        yield Finding("note", "data folder", f"{data} is readable by other users: chmod 700 {data}")
    disk = disk_use(data)
    if disk is not None:
        low = disk.free < _LOW_DISK
        advice = f"; less than {human_bytes(_LOW_DISK)} is free: the log refuses events on a full disk" if low else ""
        yield Finding("note" if low else "ok", "disk", f"{data}: {disk.text()}{advice}")


def _database(path: Path) -> Iterator[Finding]:
    if not path.exists():
        return
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5) as database:
            ((answer,),) = database.execute("PRAGMA quick_check(1)").fetchall()
    except sqlite3.OperationalError as error:
        yield Finding("note", "billing.db", f"cannot be checked now: {error}")
    except sqlite3.DatabaseError as error:
        yield Finding("problem", "billing.db", f"{error}: restore {path}, or move it away and run: {_REBUILD}")
    else:
        if answer == "ok":
            yield Finding("ok", "billing.db", "intact")
        else:
            yield Finding("problem", "billing.db", f"{answer}: restore {path}, or move it away and run: {_REBUILD}")


_REBUILD: Final = "tailrace billing rebuild"


def _config(env: dict[str, str]) -> dict[str, Any]:
    """Return the content of the TOML file, or nothing when it is unreadable (`_settings` reports that)."""
    try:
        return read_config(env)
    except SettingsError:
        return {}


def _ports(data: Path, env: dict[str, str]) -> Iterator[Finding]:
    if (holder := holder_of(data)) is not None:
        yield Finding("note", "running", f"`tailrace up` runs in {data} ({holder}); its ports are not checked")
        return
    config = _config(env)
    problems: list[str] = []
    ports = read_ports({}, env, config, problems)
    yield from (Finding("problem", "ports", problem) for problem in problems)
    for name, number in ports.items():
        try:
            check_port("127.0.0.1", number)
        except PortTaken as error:
            yield Finding("problem", f"port of {name}", f"{error}; choose another port with {PORTS[name].variable}")
        else:
            yield Finding("ok", f"port of {name}", f"{number} is free" if number else "any free port")


def _settings(env: dict[str, str]) -> Iterator[Finding]:
    problems = wrong_settings(env)
    yield from (Finding("problem", "settings", problem) for problem in problems)
    if problems:
        return
    yield from (Finding("note", "settings", line) for line in overruled(env, _config(env)))
    file = env.get("TAILRACE_CONFIG")
    yield Finding("ok", "settings", f"{file} is valid" if file else "only from the environment")


def _keys(env: dict[str, str]) -> Iterator[Finding]:
    present = [name for name in PROVIDER_KEYS if env.get(name)]
    if present:
        yield Finding("ok", "provider keys", ", ".join(present))
    else:
        yield Finding("note", "provider keys", f"none of {', '.join(PROVIDER_KEYS)}: the scripted provider answers")
