"""Money: the ledger, the price book, provider exports, delivery reports, and gaps in the log."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_APPEND_ONLY = ("ledger", "prices", "price_withdrawals", "price_revisions")
_FUNCTION = """
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'table % takes new rows only', TG_TABLE_NAME;
END
$$
"""


def upgrade() -> None:
    """Add columns and tables; queue ended generations, which the running service then settles again and prices."""
    _widen_generations()
    _create_money()
    _create_inputs()
    for table in _APPEND_ONLY:
        _allow_new_rows_only(table)
    op.execute("INSERT INTO state (name, value) VALUES ('prices', 0)")
    op.execute(
        "INSERT INTO resettlements (tenant, session, generation, partition)"
        " SELECT tenant, session, generation, partition FROM generations"
        " WHERE status NOT IN ('running', 'awaiting_provider')"
    )


def _money() -> sa.types.TypeEngine[Any]:
    return sa.BigInteger() if op.get_bind().dialect.name == "sqlite" else sa.Numeric(30, 12)


def _identity() -> sa.Column[int]:
    return sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True)


def _big(*names: str, nullable: bool = False) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger, nullable=nullable) for name in names]


def _place() -> list[sa.Column[str]]:
    return [sa.Column(c, sa.String(64), primary_key=True) for c in ("tenant", "session", "generation")]


def _widen_generations() -> None:
    text = sa.String(200)
    columns: tuple[sa.Column[Any], ...] = (
        sa.Column("reasons", text, nullable=False, server_default=""),
        sa.Column("upstream_id", text, nullable=False, server_default=""),
        sa.Column("metadata", sa.Text, nullable=False, server_default=""),
        sa.Column("pricing", sa.String(16), nullable=False, server_default="pending"),
        sa.Column("amount", _money(), nullable=False, server_default="0"),
        sa.Column("currency", sa.String(3), nullable=False, server_default=""),
        sa.Column("entries", sa.Integer, nullable=False, server_default="0"),
        *_big("subscribers", "delivered_events", "delivered_tokens", "delivered_bytes", nullable=True),
    )
    for column in columns:
        op.add_column("generations", column)
    _create_partial("generations_by_upstream", "generations", ["upstream_id"], "upstream_id <> ''")
    _create_partial("generations_unpriced", "generations", ["tenant", "started_at"], "pricing = 'unpriced'")


def _create_partial(name: str, table: str, columns: list[str], where: str) -> None:
    op.create_index(name, table, columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


def _create_money() -> None:
    name, text = sa.String(64), sa.String(200)
    op.create_table(
        "ledger",
        *_place(),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("amount", _money(), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("source", sa.String(24), nullable=False),
        sa.Column("rule", text, nullable=False),
        sa.Column("lines", sa.Text, nullable=False),
        *_big("revision", "created_at"),
    )
    op.create_index("ledger_by_time", "ledger", ["tenant", "created_at"])
    op.create_table("state", sa.Column("name", name, primary_key=True), *_big("value"))
    op.create_table(
        "price_revisions",
        sa.Column("revision", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("source", text, nullable=False),
        sa.Column("digest", name, nullable=False),
        *_big("created_at"),
    )
    op.create_table(
        "prices",
        _identity(),
        *_big("revision"),
        sa.Column("provider", text, nullable=False),
        sa.Column("model", text, nullable=False),
        sa.Column("token_class", sa.String(16), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("amount", _money(), nullable=False),
        *_big("valid_from"),
        *_big("valid_until", nullable=True),
    )
    op.create_table(
        "price_withdrawals",
        sa.Column("price", sa.BigInteger, primary_key=True, autoincrement=False),
        *_big("revision"),
    )


def _create_inputs() -> None:
    name, text = sa.String(64), sa.String(200)
    op.create_table("resettlements", *_place(), sa.Column("partition", sa.Integer, nullable=False))
    op.create_index("resettlements_by_partition", "resettlements", ["partition"])
    op.create_table(
        "provider_usage",
        _identity(),
        sa.Column("tenant", name, nullable=False),
        sa.Column("digest", name, nullable=False),
        sa.Column("provider", text, nullable=False),
        sa.Column("generation", name, nullable=False),
        sa.Column("upstream_id", text, nullable=False),
        sa.Column("usage", sa.Text, nullable=False),
        sa.Column("source", text, nullable=False),
        *_big("created_at"),
        *_big("applied_at", nullable=True),
        sa.Column("outcome", sa.String(16), nullable=False, server_default=""),
    )
    op.create_index("provider_usage_by_content", "provider_usage", ["tenant", "digest"], unique=True)
    op.create_index("provider_usage_waiting", "provider_usage", ["applied_at"])
    op.create_table(
        "deliveries",
        *_place(),
        sa.Column("counter", name, primary_key=True),
        *_big("number", "subscribers", "events", "tokens", "bytes", "sent_tokens", "reported_at"),
        sa.Column("placed", sa.Boolean, nullable=False),
    )
    _create_partial("deliveries_waiting", "deliveries", ["placed"], "NOT placed")
    op.create_table(
        "gaps",
        sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("incarnation", name, primary_key=True),
        sa.Column("first", sa.BigInteger, primary_key=True, autoincrement=False),
        *_big("last", "noticed_at"),
    )


def _allow_new_rows_only(table: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_refuses_{verb.lower()} BEFORE {verb} ON {table}"
                f" BEGIN SELECT RAISE(ABORT, 'table {table} takes new rows only'); END"
            )
        return
    if table == _APPEND_ONLY[0]:
        op.execute(_FUNCTION)
    op.execute(
        f"CREATE TRIGGER {table}_takes_new_rows BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}"
        " FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
    )
