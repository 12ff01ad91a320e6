"""Databases with the present schema, copied from one that was migrated once: to migrate each takes seconds."""

import asyncio
import tempfile
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from services.billing.adapters.database import migrate, open_engine
from services.billing.database_url import database_url

__all__ = ["copy_sqlite", "elsewhere", "migrated"]


def elsewhere(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, also where an event loop is running."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


async def migrated(url: str) -> None:
    """Bring a database up to date."""
    async with open_engine(database_url(url)) as engine:
        await migrate(engine)


@cache
def _sqlite() -> bytes:
    with tempfile.TemporaryDirectory(prefix="tailrace-migrated-") as folder:
        elsewhere(migrated(f"sqlite:///{folder}/billing.db"))
        return (Path(folder) / "billing.db").read_bytes()


def copy_sqlite(path: Path) -> None:
    """Put a migrated database there, unless there is one."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_sqlite())
