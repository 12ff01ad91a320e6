"""Generations, and the applied position of each partition."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create both tables and their indices."""
    name, text = sa.String(64), sa.String(200)
    op.create_table(
        "generations",
        sa.Column("tenant", name, primary_key=True),
        sa.Column("session", name, primary_key=True),
        sa.Column("generation", name, primary_key=True),
        sa.Column("partition", sa.Integer, nullable=False),
        *(sa.Column(c, sa.BigInteger, nullable=False) for c in ("log_seq", "epoch", "next_seq")),
        sa.Column("headless", sa.Boolean, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("status", sa.String(24), nullable=False),
        *(sa.Column(c, text, nullable=False) for c in ("code", "model", "provider", "upstream_model")),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        *(sa.Column(c, sa.BigInteger, nullable=True) for c in ("ended_at", "reported_at", "settle_at")),
        *(sa.Column(c, sa.BigInteger, nullable=False) for c in ("counted_input", "counted_output")),
        sa.Column("counted_exact", sa.Boolean, nullable=False),
        sa.Column("encoding", text, nullable=False),
        *(
            sa.Column(c, sa.BigInteger, nullable=True)
            for c in ("input", "output", "cached_input", "cache_write", "reasoning")
        ),
        sa.Column("usage", sa.Text, nullable=True),
        sa.Column("usage_source", text, nullable=False),
        *(sa.Column(c, sa.BigInteger, nullable=True) for c in ("drift_input", "drift_output")),
        *(
            sa.Column(c, sa.BigInteger, nullable=False)
            for c in ("duplicates", "gaps", "zombies", "late", "unknown", "malformed")
        ),
    )
    op.create_index("generations_by_name", "generations", ["tenant", "generation"])
    op.create_index("generations_by_start", "generations", ["tenant", "started_at"])
    op.create_index("generations_by_session", "generations", ["tenant", "session", "started_at", "generation"])
    op.create_index("generations_by_status", "generations", ["status"])
    op.create_index("generations_due", "generations", ["partition", "settle_at"])
    op.create_table(
        "partitions",
        sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("incarnation", name, nullable=False),
        sa.Column("applied", sa.BigInteger, nullable=False),
        sa.Column("holder", name, nullable=True),
        sa.Column("held_until", sa.BigInteger, nullable=False),
    )
