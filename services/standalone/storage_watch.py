"""Restart the broker when it keeps refusing to store although there is free disk space."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import httpx

from services.standalone.store import free_bytes

__all__ = ["StorageWatch"]

POLL_SECONDS: Final = 2.0
REFUSING_SECONDS: Final = 4.0
"""Seconds for which a service must report refusals before a restart, to rule out a slow disk."""
AGAIN_SECONDS: Final = 30.0
"""Least seconds between two restarts of the broker."""
NEEDED_BYTES: Final = 32 * 1024 * 1024
"""Free disk space below which a restart would not help."""


class StorageWatch:
    """Poll the services' readiness at the addresses ``ready``. ``restart`` restarts the brokers, one after another.

    After one failed write nats-server keeps refusing writes to that stream, even when there is space again.
    """

    def __init__(
        self, ready: Sequence[str], data: Path, restart: Callable[[], Awaitable[None]], notify: Callable[[str], None]
    ) -> None:
        self._ready = ready
        self._data = data
        self._restart = restart
        self._notify = notify
        self._since: float | None = None
        self._restarted_at = -AGAIN_SECONDS
        self._has_notified = False

    async def run(self) -> None:
        """Watch until cancelled."""
        async with httpx.AsyncClient(timeout=3, trust_env=False) as client:
            while True:
                await asyncio.sleep(POLL_SECONDS)
                await self._poll(client)

    async def _poll(self, client: httpx.AsyncClient) -> None:
        now = asyncio.get_running_loop().time()
        if not any([await _refuses(client, address) for address in self._ready]):
            self._since, self._has_notified = None, False
            return
        self._since = now if self._since is None else self._since
        if now - self._since < REFUSING_SECONDS or now - self._restarted_at < AGAIN_SECONDS:
            return
        free = free_bytes(self._data)
        if free < NEEDED_BYTES:
            if not self._has_notified:
                self._notify(
                    f"the broker stores nothing: the disk of {self._data} is full ({free >> 20} MB free);"
                    f" requests are refused until {NEEDED_BYTES >> 20} MB are free"
                )
            self._has_notified = True
            return
        self._notify("the broker stores nothing although there is free space: restarting it")
        await self._restart()
        self._restarted_at = asyncio.get_running_loop().time()
        self._since, self._has_notified = None, False


async def _refuses(client: httpx.AsyncClient, address: str) -> bool:
    """Return whether a service reports that the log refuses its writes."""
    try:
        answer = await client.get(address)
        return answer.status_code == 503 and answer.json()["checks"].get("log") is False
    except (httpx.HTTPError, ValueError, KeyError, AttributeError):
        return False
