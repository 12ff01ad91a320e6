"""The tables as SQLAlchemy definitions; the migrations create them."""

from typing import Final

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer, MetaData, String, Table, Text, text

from services.billing.adapters.columns import MoneyType

__all__ = [
    "BUDGETS",
    "CALLS",
    "DELIVERIES",
    "GAPS",
    "GENERATIONS",
    "LEDGER",
    "PARTITIONS",
    "PRICES",
    "PRICE_REVISIONS",
    "PRICE_WITHDRAWALS",
    "PROVIDER_USAGE",
    "RESERVATIONS",
    "RESETTLEMENTS",
    "SPENDING",
    "STATE",
    "metadata",
]

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
    Column("calls", Text, nullable=False, server_default=""),
    Column("usage", Text, nullable=True),
    Column("usage_source", _TEXT, nullable=False),
    _reported("drift_input"),
    _reported("drift_output"),
    *(_count(name) for name in ("duplicates", "gaps", "zombies", "late", "unknown", "malformed")),
    Column("reasons", _TEXT, nullable=False, server_default=""),
    Column("upstream_id", _TEXT, nullable=False, server_default=""),
    Column("metadata", Text, nullable=False, server_default=""),
    Column("credential", _TEXT, nullable=False, server_default=""),
    Column("pricing", String(16), nullable=False, server_default="pending"),
    Column("amount", MoneyType, nullable=False, server_default="0"),
    Column("currency", String(3), nullable=False, server_default=""),
    Column("entries", Integer, nullable=False, server_default="0"),
    Column("tokens", BigInteger, nullable=False, server_default="0"),
    _reported("cache_write_1h"),
    *(_reported(name) for name in ("subscribers", "delivered_events", "delivered_tokens", "delivered_bytes")),
    Index("generations_by_name", "tenant", "generation"),
    Index("generations_by_start", "tenant", "started_at"),
    Index("generations_by_session", "tenant", "session", "started_at", "generation"),
    Index("generations_by_status", "status"),
    Index("generations_due", "partition", "settle_at"),
    Index(
        "generations_by_upstream",
        "upstream_id",
        postgresql_where=text("upstream_id <> ''"),
        sqlite_where=text("upstream_id <> ''"),
    ),
    Index(
        "generations_unpriced",
        "tenant",
        "started_at",
        postgresql_where=text("pricing = 'unpriced'"),
        sqlite_where=text("pricing = 'unpriced'"),
    ),
)

CALLS: Final = Table(
    "calls",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("session", _NAME, primary_key=True),
    Column("generation", _NAME, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("upstream_id", _TEXT, nullable=False),
    Index("calls_by_upstream", "upstream_id"),
)
"""Upstream ids of abandoned calls, to match provider exports; ``generations.calls`` holds the calls."""

PARTITIONS: Final = Table(
    "partitions",
    metadata,
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("incarnation", _NAME, nullable=False),
    _count("applied"),
    Column("stamp", BigInteger, nullable=False, server_default="0"),
    Column("holder", _NAME, nullable=True),
    _count("held_until"),
)

LEDGER: Final = Table(
    "ledger",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("session", _NAME, primary_key=True),
    Column("generation", _NAME, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(16), nullable=False),
    Column("amount", MoneyType, nullable=False),
    Column("currency", String(3), nullable=False),
    Column("source", String(24), nullable=False),
    Column("rule", _TEXT, nullable=False),
    Column("lines", Text, nullable=False),
    _count("revision"),
    _count("created_at"),
    Index("ledger_by_time", "tenant", "created_at"),
)

STATE: Final = Table(
    "state",
    metadata,
    Column("name", _NAME, primary_key=True),
    _count("value"),
)
"""``prices``: the price book's revision. Batches read it under a lock, so none is priced by a replaced book."""

PRICE_REVISIONS: Final = Table(
    "price_revisions",
    metadata,
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("source", _TEXT, nullable=False),
    Column("digest", _NAME, nullable=False),
    _count("created_at"),
)

PRICES: Final = Table(
    "prices",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    _count("revision"),
    Column("provider", _TEXT, nullable=False),
    Column("model", _TEXT, nullable=False),
    Column("token_class", String(16), nullable=False),
    Column("currency", String(3), nullable=False),
    Column("amount", MoneyType, nullable=False),
    _count("valid_from"),
    _reported("valid_until"),
)

PRICE_WITHDRAWALS: Final = Table(
    "price_withdrawals",
    metadata,
    Column("price", BigInteger, primary_key=True, autoincrement=False),
    _count("revision"),
)
"""Rows of the price book that are no longer valid; the rows themselves never change."""

RESETTLEMENTS: Final = Table(
    "resettlements",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("session", _NAME, primary_key=True),
    Column("generation", _NAME, primary_key=True),
    Column("partition", Integer, nullable=False),
    Index("resettlements_by_partition", "partition"),
)
"""Generations to settle again after a change of prices, by the process that holds their partition."""

PROVIDER_USAGE: Final = Table(
    "provider_usage",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("tenant", _NAME, nullable=False),
    Column("digest", _NAME, nullable=False),
    Column("provider", _TEXT, nullable=False),
    Column("generation", _NAME, nullable=False),
    Column("upstream_id", _TEXT, nullable=False),
    Column("usage", Text, nullable=False),
    Column("source", _TEXT, nullable=False),
    _count("created_at"),
    _reported("applied_at"),
    Column("outcome", String(16), nullable=False, server_default=""),
    Index("provider_usage_by_content", "tenant", "digest", unique=True),
    Index("provider_usage_waiting", "applied_at"),
)

DELIVERIES: Final = Table(
    "deliveries",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("session", _NAME, primary_key=True),
    Column("generation", _NAME, primary_key=True),
    Column("counter", _NAME, primary_key=True),
    *(_count(name) for name in ("number", "subscribers", "events", "tokens", "bytes", "sent_tokens", "reported_at")),
    Column("placed", Boolean, nullable=False),
    Index("deliveries_waiting", "placed", postgresql_where=text("NOT placed"), sqlite_where=text("NOT placed")),
)
"""The newest report of each delivery counter of a generation; ``placed`` once the generation's row holds the sums."""

GAPS: Final = Table(
    "gaps",
    metadata,
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("incarnation", _NAME, primary_key=True),
    Column("first", BigInteger, primary_key=True, autoincrement=False),
    _count("last"),
    _count("noticed_at"),
)
"""Stream sequences that the log no longer had when billing reached them."""

BUDGETS: Final = Table(
    "budgets",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("name", _NAME, primary_key=True),
    Column("credential", _TEXT, nullable=False),
    Column("period", String(8), nullable=False),
    Column("unit", String(8), nullable=False),
    Column("soft", String(40), nullable=True),
    Column("hard", String(40), nullable=True),
    _count("changed_at"),
)
"""Limits are text: tokens and money in one column, exact on both databases."""

RESERVATIONS: Final = Table(
    "reservations",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("session", _NAME, primary_key=True),
    Column("generation", _NAME, primary_key=True),
    Column("currency", String(3), primary_key=True),
    Column("credential", _TEXT, nullable=False),
    _count("tokens"),
    Column("amount", MoneyType, nullable=False),
    _count("expires_at"),
    Index("reservations_by_age", "expires_at"),
)
"""Reservations of generations that have not settled: tokens in the row without a currency, money in the others."""

SPENDING: Final = Table(
    "spending",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("credential", _TEXT, primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("provider", _TEXT, primary_key=True),
    Column("model", _TEXT, primary_key=True),
    Column("status", String(24), primary_key=True),
    Column("currency", String(3), primary_key=True),
    *(_count(name) for name in ("generations", "tokens")),
    Column("amount", MoneyType, nullable=False),
    *(_count(name) for name in ("input", "output", "cached_input", "cache_write", "reasoning")),
    *(_count(name) for name in ("counted_input", "counted_output", "drift", "unpriced")),
    Column("cache_write_1h", BigInteger, nullable=False, server_default="0"),
    Index("spending_by_day", "tenant", "day"),
)
"""Usage sums of settled generations, by the day (since 1970, UTC) of their start."""
