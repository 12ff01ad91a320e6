"""A migrated database of either kind without content, and an empty one."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from services.billing.adapters.database import open_engine
from services.billing.database_url import database_url
from tests.support.migrated_database import copy_sqlite
from tests.support.postgres import created, postgres_server, postgres_url

__all__ = ["database", "empty_database", "engine", "postgres_server", "postgres_url"]
KINDS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a migrated database."""
    if request.param == "sqlite":
        copy_sqlite(tmp_path / "deep" / "billing.db")
        return f"sqlite:///{tmp_path}/deep/billing.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture(params=KINDS)
async def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """The address of a database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/deep/billing.db"
        return
    async with created(request, empty=True) as url:
        yield url


@pytest.fixture
async def engine(database: str) -> AsyncIterator[AsyncEngine]:
    async with open_engine(database_url(database)) as opened:
        yield opened
