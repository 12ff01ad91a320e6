"""How alembic runs the steps: on the connection that `services.billing.adapters.database.migrate` hands over."""

from alembic import context

from services.billing.adapters.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
