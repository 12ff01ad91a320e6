"""Read billing's database directly."""

import sqlite3
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.chaos.history import Amounts

__all__ = ["Found", "read_database"]

PLACES: Final = 12
"""Decimal places of amounts, which SQLite stores as integers in units of 10⁻¹²."""


class Found(NamedTuple):
    """Content of the database. ``applied``: position in each partition. ``settled``: nothing is pending."""

    applied: dict[int, int]
    rows: list[dict[str, Any]]
    amounts: Amounts
    settled: bool


def read_database(path: Path) -> Found:
    """Return the content of the SQLite file at ``path``; empty while its tables do not exist."""
    connection = sqlite3.connect(path, timeout=10)
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("BEGIN")  # a consistent snapshot: billing continues meanwhile
        applied = {row["partition"]: row["applied"] for row in connection.execute("SELECT * FROM partitions")}
        rows = [dict(row) for row in connection.execute("SELECT * FROM generations")]
        amounts = Amounts(
            entries=_read(connection, "SELECT generation, number, kind, amount, currency FROM ledger"),
            spending=_read(connection, "SELECT day, currency, tokens, amount FROM spending"),
            reserved=_read(connection, "SELECT generation, currency, tokens, amount FROM reservations"),
        )
        waiting = connection.execute("SELECT count(*) FROM provider_usage WHERE applied_at IS NULL").fetchone()[0]
    except sqlite3.OperationalError:
        return Found({}, [], Amounts(entries=[], spending=[], reserved=[]), False)
    finally:
        connection.close()
    settled = not waiting and all(row["status"] not in ("running", "awaiting_provider") for row in rows)
    return Found(applied, rows, amounts, settled)


def _read(connection: sqlite3.Connection, query: str) -> list[dict[str, Any]]:
    return [dict(row) | {"amount": f"{Decimal(row['amount']).scaleb(-PLACES):f}"} for row in connection.execute(query)]
