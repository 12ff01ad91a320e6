"""The tables as SQLAlchemy sees them; the migrations create them."""

from typing import Final

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer, MetaData, String, Table, Text

__all__ = ["GENERATIONS", "PARTITIONS", "metadata"]

metadata: Final = MetaData()
_NAME: Final = String(64)
_TEXT: Final = String(200)


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _reported(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=True)


GENERATIONS: Final = Table(
    "generations",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("session", _NAME, primary_key=True),
    Column("generation", _NAME, primary_key=True),
    Column("partition", Integer, nullable=False),
    _count("log_seq"),
    _count("epoch"),
    _count("next_seq"),
    Column("headless", Boolean, nullable=False),
    Column("state", String(16), nullable=False),
    Column("status", String(24), nullable=False),
    Column("code", _TEXT, nullable=False),
    Column("model", _TEXT, nullable=False),
    Column("provider", _TEXT, nullable=False),
    Column("upstream_model", _TEXT, nullable=False),
    _count("started_at"),
    _reported("ended_at"),
    _reported("reported_at"),
    _reported("settle_at"),
    _count("counted_input"),
    _count("counted_output"),
    Column("counted_exact", Boolean, nullable=False),
    Column("encoding", _TEXT, nullable=False),
    _reported("input"),
    _reported("output"),
    _reported("cached_input"),
    _reported("cache_write"),
    _reported("reasoning"),
    Column("usage", Text, nullable=True),
    Column("usage_source", _TEXT, nullable=False),
    _reported("drift_input"),
    _reported("drift_output"),
    *(_count(name) for name in ("duplicates", "gaps", "zombies", "late", "unknown", "malformed")),
    Index("generations_by_name", "tenant", "generation"),
    Index("generations_by_start", "tenant", "started_at"),
    Index("generations_by_session", "tenant", "session", "started_at", "generation"),
    Index("generations_by_status", "status"),
    Index("generations_due", "partition", "settle_at"),
)

PARTITIONS: Final = Table(
    "partitions",
    metadata,
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("incarnation", _NAME, nullable=False),
    _count("applied"),
    Column("holder", _NAME, nullable=True),
    _count("held_until"),
)
