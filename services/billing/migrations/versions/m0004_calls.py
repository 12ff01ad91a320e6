"""Abandoned calls of a generation, and their upstream ids."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add a column and a table; generations settled before have no separate calls."""
    name = sa.String(64)
    op.add_column("generations", sa.Column("calls", sa.Text, nullable=False, server_default=""))
    op.create_table(
        "calls",
        *(sa.Column(c, name, primary_key=True) for c in ("tenant", "session", "generation")),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("upstream_id", sa.String(200), nullable=False),
    )
    op.create_index("calls_by_upstream", "calls", ["upstream_id"])
