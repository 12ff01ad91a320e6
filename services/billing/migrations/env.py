"""Run the migrations on the connection passed by `services.billing.adapters.database.migrate`."""

from alembic import context

from services.billing.adapters.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
