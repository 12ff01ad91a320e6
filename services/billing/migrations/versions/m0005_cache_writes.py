"""A separate count of cache writes for an hour."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add a column to generations and to their sums."""
    op.add_column("generations", sa.Column("cache_write_1h", sa.BigInteger, nullable=True))
    op.add_column("spending", sa.Column("cache_write_1h", sa.BigInteger, nullable=False, server_default="0"))
