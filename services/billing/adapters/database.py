"""The database: file, engine, transactions and schema."""

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
"""PostgreSQL advisory lock that serialises migrations; the number is arbitrary, but must never change."""
SCRIPTS: Final = str(Path(__file__).parent.parent / "migrations")
"""Folder of the migrations."""
_BUSY_SECONDS: Final = 10.0
DISPOSE_SECONDS: Final = 0.5
CHECKED_BYTES: Final = 256 * 1024 * 1024
"""Bound of a SQLite file that is checked completely at start."""
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_NOT_WRITABLE: Final = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
_RESTORE: Final = (
    "put a backup in its place and run `tailrace billing rebuild`; without a backup move the file away first: what the"
    " log still keeps is billed anew, prices and budgets must be set again"
)


def create_file(url: URL) -> None:
    """Create a SQLite file and its folder if they are missing, readable by the owner only; an existing folder is
    unchanged.

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
    """Yield an engine that connects on first use; create a SQLite file and its folder."""
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
        with suppress(TimeoutError):  # do not wait for a database that does not answer
            async with asyncio.timeout(DISPOSE_SECONDS):
                await engine.dispose()


def _prepare_sqlite(engine: AsyncEngine) -> None:
    """Let SQLAlchemy, not the driver, begin transactions: writers take the lock first, so that two never deadlock."""

    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        # WAL: readers do not wait for the writer. NORMAL: a power cut may lose the last transactions, but no others;
        # they are read again from the log, because the position is lost with them.
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
    """Yield a connection in a transaction that is committed at the end.

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
    """Translate the libraries' errors to ours, and keep the cause."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        # Statements run directly on the driver raise the driver's own errors.
        origin = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(origin, sqlite3.Error) and _code(origin) in _DAMAGED:
            raise LedgerUnusable(str(origin), _RESTORE) from error
        if isinstance(error, (DBAPIError, sqlite3.Error)):
            raise LedgerUnavailable(str(origin)) from error
        if isinstance(error, (PoolTimeout, OSError, TimeoutError, SQLAlchemyError)):
            raise LedgerUnavailable(repr(error)) from error


async def migrate(engine: AsyncEngine) -> None:
    """Migrate the schema to the latest version; concurrent processes run one after the other.

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
            # A read-only file is found only by a write.
            await connection.execute(sa.text("UPDATE alembic_version SET version_num = version_num"))
    except LedgerUnavailable as error:
        origin = error.__cause__.orig if isinstance(error.__cause__, DBAPIError) else error.__cause__
        if isinstance(origin, sqlite3.Error) and _code(origin) in _NOT_WRITABLE:
            raise LedgerUnusable(str(origin), "let billing write the file and its folder") from error
        raise
    except CommandError as error:
        remedy = "run the version of Tailrace that created it, or a newer one"
        raise LedgerUnusable(f"its schema version is unknown ({error})", remedy) from error


async def _check(connection: AsyncConnection) -> None:
    """Check that a SQLite file is one of billing's, and search it for damage.

    In a large file, damage is found only when it is read.

    Raises:
        LedgerUnusable: it is not, or is damaged.
    """
    tables = set((await connection.execute(sa.text("SELECT name FROM sqlite_master WHERE type = 'table'"))).scalars())
    if tables and "alembic_version" not in tables:
        raise LedgerUnusable(
            f"it is another application's database, with {sorted(tables)[0]!r} in it", "name another file"
        )
    pages = (await connection.execute(sa.text("PRAGMA page_count"))).scalar_one()
    size = (await connection.execute(sa.text("PRAGMA page_size"))).scalar_one()
    if pages * size > CHECKED_BYTES:
        return
    found = (await connection.execute(sa.text("PRAGMA quick_check(1)"))).scalar_one()
    if found != "ok":
        raise LedgerUnusable(f"it is damaged ({found})", _RESTORE)


def _code(error: sqlite3.Error) -> int:
    """Return the primary result code of an error; 0 if it has none."""
    return (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF


def _upgrade(connection: Connection) -> None:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", SCRIPTS)
    command.upgrade(config, "head")
