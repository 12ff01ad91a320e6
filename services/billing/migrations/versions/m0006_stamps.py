"""Positions in the log with the time of the message there, by which a log that has lost its end is noticed."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add a column; of positions from before nothing is known but their sequence."""
    op.add_column("partitions", sa.Column("stamp", sa.BigInteger, nullable=False, server_default="0"))
