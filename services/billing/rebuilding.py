"""``python -m services.billing rebuild``: fold every partition again from the log, while billing is stopped."""

import os
import secrets
import sys
from collections.abc import Mapping

from sqlalchemy.ext.asyncio import AsyncEngine

from services.billing.adapters.database import create_file, migrate, open_engine
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.prices import Prices
from services.billing.adapters.tail import Tail
from services.billing.database_url import database_url, sqlite_url
from services.billing.rebuild import Rebuild, Rebuilt
from services.billing.settings import Settings
from services.billing.terms import CurrentTerms
from services.kit.clock import SystemClock
from services.kit.jetstream.broker import Broker
from services.kit.settings import Shared, load_settings
from services.kit.shutdown import Stop
from services.kit.telemetry import configure_logging

__all__ = ["describe", "main", "rebuild_all"]


async def main(_stop: Stop, env: Mapping[str, str] = os.environ) -> None:
    """Rebuild, and print a line for each partition.

    Raises:
        SettingsError: settings are not usable.
        BrokerUnavailable: no broker answers.
        BillingError: a running process holds a partition, or the database does not answer.
    """
    shared, settings = load_settings(Settings, "billing", env)
    configure_logging("billing", shared.log_level, shared.log_format)
    url = database_url(settings.database_url) if settings.database_url else sqlite_url(f"{shared.data}/billing.db")
    create_file(url)
    async with open_engine(url) as engine, Broker.connect(shared.nats_url, "billing", tls=shared.tls()) as broker:
        await migrate(engine)
        for found in await rebuild_all(broker, engine, shared, settings):
            sys.stdout.write(describe(found) + "\n")


async def rebuild_all(broker: Broker, engine: AsyncEngine, shared: Shared, settings: Settings) -> list[Rebuilt]:
    """Fold every partition's log again into a migrated database; return the result of each.

    Raises:
        BrokerUnavailable: no broker answers.
        BillingError: a running process holds a partition, or the database does not answer.
    """
    topology = await broker.apply(shared.topology())
    terms = CurrentTerms(Prices(engine), settings.policy(), settings.charging())
    ledger = Ledger(engine, f"rebuild-{secrets.token_hex(6)}", hold=max(settings.hold, 30.0))
    found: list[Rebuilt] = []
    for partition in topology.logs:
        tail = Tail(broker, topology, partition, batch=settings.batch, interval=settings.interval)
        found.append(await Rebuild(partition, tail, ledger, terms, SystemClock()).run())
    return found


def describe(found: Rebuilt) -> str:
    """Format a rebuild's result as one line."""
    reach = "nothing" if found.last < found.first else f"{found.first} to {found.last}"
    lost = "; what came before is no longer in the log and was left as it was" if found.missing_before else ""
    return (
        f"partition {found.partition}: log {reach}{lost}; events: {found.events}, generations: {found.generations},"
        f" set right: {found.changed}, entries written: {found.entries}"
    )
