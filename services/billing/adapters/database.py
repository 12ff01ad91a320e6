"""The database: its address, its engine, its schema."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
import structlog
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from services.billing.errors import LedgerUnavailable, LedgerUnusable
from services.kit.private_files import private_file, private_folder, tighten

__all__ = ["SCRIPTS", "create_file", "migrate", "open_engine", "reading", "writing"]

log = structlog.get_logger()
_MIGRATION_LOCK: Final = 0x7461696C72616365
"""PostgreSQL advisory lock under which only one process migrates; the number is arbitrary, but fixed for ever."""
SCRIPTS: Final = str(Path(__file__).parent.parent / "migrations")
"""Folder of the migrations."""
_BUSY_SECONDS: Final = 10.0
DISPOSE_SECONDS: Final = 0.5
CHECKED_BYTES: Final = 256 * 1024 * 1024
"""Bound of a SQLite file that is read through when billing starts."""
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_NOT_WRITABLE: Final = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
_RESTORE: Final = (
    "put a backup in its place and run `tailrace billing rebuild`; without a backup move the file away first: what the"
    " log still keeps is billed anew, prices and budgets must be set again"
)


def create_file(url: URL) -> None:
    """Create a SQLite file and its folder where needed; nobody else may read it. A folder that is there stays as it is.

    Raises:
        OSError: one of them cannot be created.
    """
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return
    path = Path(url.database)
    warnings = [private_folder(path.parent)] if not path.parent.exists() else []
    warnings.append(private_file(path))  # SQLite gives its mode to the files beside it
    warnings += [tighten(path.with_name(path.name + suffix)) for suffix in ("-wal", "-shm", "-journal")]
    for warning in filter(None, warnings):
        log.warning("the database is not private", detail=warning)


@asynccontextmanager
async def open_engine(url: URL) -> AsyncIterator[AsyncEngine]:
    """Yield an engine that connects when it is first used; a SQLite file and its folder are created."""
    options: dict[str, Any] = {"pool_pre_ping": True, "pool_timeout": 5.0}
    if url.get_backend_name() == "sqlite":
        create_file(url)
        options["connect_args"] = {"timeout": _BUSY_SECONDS}
    else:
        options |= {"pool_size": 5, "max_overflow": 5, "connect_args": {"timeout": 5.0, "command_timeout": 30.0}}
    engine = create_async_engine(url, **options)
    if url.get_backend_name() == "sqlite":
        _prepare_sqlite(engine)
    try:
        yield engine
    finally:
        with suppress(TimeoutError):  # a database that does not answer would be waited for
            async with asyncio.timeout(DISPOSE_SECONDS):
                await engine.dispose()


def _prepare_sqlite(engine: AsyncEngine) -> None:
    """Let SQLAlchemy, not the driver, begin transactions: writers with the lock, so that two never deadlock."""

    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        # WAL: readers do not wait for the writer. NORMAL: a power cut may lose the last transactions, never more, and
        # those are read again from the log, because the position is lost with them.
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    sa.event.listen(engine.sync_engine, "connect", connected)
    sa.event.listen(engine.sync_engine, "begin", begun)


@asynccontextmanager
async def writing(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Yield a connection in one transaction, committed in the end.

    Raises:
        LedgerUnavailable: the database did not answer or refused.
    """
    with _translated():
        async with engine.connect() as plain:
            connection = await plain.execution_options(writes=True)
            async with connection.begin():
                yield connection


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Yield a connection for reading.

    Raises:
        LedgerUnavailable: the database did not answer or refused.
    """
    with _translated():
        async with engine.connect() as connection:
            yield connection


class _translated:  # noqa: N801  # reads as a statement
    """Maps the libraries' errors to ours, keeping the cause."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        # Of statements that were handed to the driver itself, the driver's own errors come.
        origin = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(origin, sqlite3.Error) and _code(origin) in _DAMAGED:
            raise LedgerUnusable(str(origin), _RESTORE) from error
        if isinstance(error, (DBAPIError, sqlite3.Error)):
            raise LedgerUnavailable(str(origin)) from error
        if isinstance(error, (PoolTimeout, OSError, TimeoutError, SQLAlchemyError)):
            raise LedgerUnavailable(repr(error)) from error


async def migrate(engine: AsyncEngine) -> None:
    """Bring the schema up to date; processes that start at once do it one after the other.

    Raises:
        LedgerUnavailable: the database did not answer or refused.
        LedgerUnusable: it is damaged, not one of billing's, of a newer version, or cannot be written.
    """
    try:
        async with writing(engine) as connection:
            if connection.dialect.name == "postgresql":
                await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            else:
                await _check(connection)
            await connection.run_sync(_upgrade)
            # A file that may only be read shows with the first write.
            await connection.execute(sa.text("UPDATE alembic_version SET version_num = version_num"))
    except LedgerUnavailable as error:
        origin = error.__cause__.orig if isinstance(error.__cause__, DBAPIError) else error.__cause__
        if isinstance(origin, sqlite3.Error) and _code(origin) in _NOT_WRITABLE:
            raise LedgerUnusable(str(origin), "let billing write the file and its folder") from error
        raise
    except CommandError as error:
        remedy = "run the version of Tailrace that made it, or a newer one"
        raise LedgerUnusable(f"its schema is not known here ({error})", remedy) from error


async def _check(connection: AsyncConnection) -> None:
    """See that a SQLite file is one of billing's, and find damage that shows only where it is read.

    Of a large file the damage is found when it is come upon.

    Raises:
        LedgerUnusable: it is not, or is damaged.
    """
    tables = set((await connection.execute(sa.text("SELECT name FROM sqlite_master WHERE type = 'table'"))).scalars())
    if tables and "alembic_version" not in tables:
        raise LedgerUnusable(
            f"it is a database of something else, with {sorted(tables)[0]!r} in it", "name another file"
        )
    pages = (await connection.execute(sa.text("PRAGMA page_count"))).scalar_one()
    size = (await connection.execute(sa.text("PRAGMA page_size"))).scalar_one()
    if pages * size > CHECKED_BYTES:
        return
    found = (await connection.execute(sa.text("PRAGMA quick_check(1)"))).scalar_one()
    if found != "ok":
        raise LedgerUnusable(f"it is damaged ({found})", _RESTORE)


def _code(error: sqlite3.Error) -> int:
    """Return the primary result code of an error; 0 where there is none."""
    return (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF


def _upgrade(connection: Connection) -> None:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", SCRIPTS)
    command.upgrade(config, "head")
