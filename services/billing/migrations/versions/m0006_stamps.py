"""The storage time of the message at each position, to detect a log that has lost its end."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add a column; earlier positions have no stamp."""
    op.add_column("partitions", sa.Column("stamp", sa.BigInteger, nullable=False, server_default="0"))
