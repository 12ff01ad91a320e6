"""Budgets: limits, reservations, and usage sums."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add columns and tables; queue settled generations, whose usage counts from their next settlement."""
    text, name = sa.String(200), sa.String(64)
    op.add_column("generations", sa.Column("credential", text, nullable=False, server_default=""))
    op.add_column("generations", sa.Column("tokens", sa.BigInteger, nullable=False, server_default="0"))
    op.create_table(
        "budgets",
        sa.Column("tenant", name, primary_key=True),
        sa.Column("name", name, primary_key=True),
        sa.Column("credential", text, nullable=False),
        sa.Column("period", sa.String(8), nullable=False),
        sa.Column("unit", sa.String(8), nullable=False),
        sa.Column("soft", sa.String(40), nullable=True),
        sa.Column("hard", sa.String(40), nullable=True),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "reservations",
        *(sa.Column(c, name, primary_key=True) for c in ("tenant", "session", "generation")),
        sa.Column("currency", sa.String(3), primary_key=True),
        sa.Column("credential", text, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("amount", _money(), nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
    )
    op.create_index("reservations_by_age", "reservations", ["expires_at"])
    _create_spending()
    op.execute("DELETE FROM resettlements")
    op.execute(
        "INSERT INTO resettlements (tenant, session, generation, partition)"
        " SELECT tenant, session, generation, partition FROM generations"
        " WHERE status NOT IN ('running', 'awaiting_provider')"
    )


def _create_spending() -> None:
    places = [("tenant", 64), ("credential", 200), ("provider", 200), ("model", 200), ("status", 24), ("currency", 3)]
    op.create_table(
        "spending",
        *(sa.Column(name, sa.String(length), primary_key=True) for name, length in places),
        sa.Column("day", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("amount", _money(), nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in ("generations", "tokens", *_SUMMED, "unpriced")),
    )
    op.create_index("spending_by_day", "spending", ["tenant", "day"])
    place = "tenant, credential, started_at / 86400000, provider, model, status, currency"
    sums = ", ".join(f"COALESCE(SUM({column}), 0)" for column in (*_SUMMED[:-1], "drift_output"))
    unpriced = "SUM(CASE WHEN pricing = 'unpriced' THEN 1 ELSE 0 END)"
    columns = ", ".join(_SUMMED)
    op.execute(
        "INSERT INTO spending (tenant, credential, day, provider, model, status, currency,"  # noqa: S608  # constants
        f" generations, tokens, amount, {columns}, unpriced)"
        f" SELECT {place}, COUNT(*), 0, SUM(amount), {sums}, {unpriced} FROM generations"
        f" WHERE status NOT IN ('running', 'awaiting_provider') GROUP BY {place}"
    )


_SUMMED = (
    "input",
    "output",
    "cached_input",
    "cache_write",
    "reasoning",
    "counted_input",
    "counted_output",
    "drift",
)


def _money() -> sa.types.TypeEngine[Any]:
    return sa.BigInteger() if op.get_bind().dialect.name == "sqlite" else sa.Numeric(30, 12)
