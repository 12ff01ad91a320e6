"""The URL of the ledger's database, with its asynchronous driver."""

from typing import Final

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

__all__ = ["database_url", "sqlite_url"]

_DRIVERS: Final = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}


def database_url(text: str) -> URL:
    """Parse a database URL and set its asynchronous driver.

    Raises:
        ValueError: it is not a URL, or names another database than SQLite and PostgreSQL.
    """
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise ValueError(
            "it is not a database URL such as sqlite:///billing.db or postgresql://user@host/name"
        ) from error
    driver = _DRIVERS.get(url.drivername)
    if driver is None:
        raise ValueError(f"database {url.drivername!r} is not supported: use sqlite or postgresql")
    return url.set(drivername=driver)


def sqlite_url(path: str) -> URL:
    """Return the URL of a SQLite file."""
    return URL.create("sqlite+aiosqlite", database=path)
