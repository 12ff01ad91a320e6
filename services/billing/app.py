"""Assemble billing from its settings and run it."""

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import structlog
import tenacity
from sqlalchemy.ext.asyncio import AsyncEngine

from services.billing import metrics
from services.billing.adapters.budgets import Budgets
from services.billing.adapters.database import create_file, migrate, open_engine
from services.billing.adapters.deliveries import Deliveries
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.prices import Prices
from services.billing.adapters.reports import Reports
from services.billing.adapters.tail import Tail
from services.billing.admission import Admission
from services.billing.api import build_api
from services.billing.consumer import RELEASE_SECONDS, Consumer
from services.billing.database_url import database_url, sqlite_url
from services.billing.deliveries import DeliveryReports
from services.billing.errors import LedgerUnavailable
from services.billing.price_loading import load_price_file, load_shipped_prices
from services.billing.settings import Settings
from services.billing.terms import CurrentTerms
from services.kit.auth.config import authenticating
from services.kit.auth.middleware import entering
from services.kit.body_limit import reading_bodies
from services.kit.clock import SystemClock
from services.kit.http import serving
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.storage import Storage
from services.kit.request_head import BodyLimit
from services.kit.settings import SettingsError, Shared, load_settings, own_tls
from services.kit.shutdown import ANSWERS, Stop, end, until_drained
from services.kit.telemetry import configure_logging, describe_service

__all__ = ["main"]

log = structlog.get_logger()
IMPORT_SECONDS: Final = 300.0  # time for the body of a provider's export
PARTITIONS_SECONDS: Final = 10.0


async def main(stop: Stop, env: Mapping[str, str] = os.environ) -> None:
    """Run the service until ``stop`` is set.

    Raises:
        SettingsError: settings are not usable.
        PortTaken: the HTTP address is in use.
        BrokerUnavailable: no broker answers.
    """
    shared, settings = load_settings(Settings, "billing", env)
    stop.drain = settings.drain
    configure_logging("billing", shared.log_level, shared.log_format)
    describe_service("billing", shared.described())
    url = database_url(settings.database_url) if settings.database_url else sqlite_url(f"{shared.data}/billing.db")
    try:
        create_file(url)
    except OSError as error:
        raise SettingsError([f"{url.database} cannot be created: {error.strerror}"]) from error
    async with open_engine(url) as engine, Broker.connect(shared.nats_url, "billing", tls=shared.tls()) as broker:
        broker.on_reconnect(_count_reconnect)
        await broker.keep(shared.topology())  # needed for authentication from the first request on
        ledger = Ledger(engine, _holder(), hold=settings.hold)
        migrated = asyncio.Event()

        async def database() -> bool:
            return migrated.is_set() and await ledger.answers()

        storage = Storage(broker, "billing")

        async def connected() -> bool:
            return broker.is_connected

        async def stores() -> bool:
            return storage.stores()

        prices = Prices(engine)
        terms = CurrentTerms(prices, settings.policy(), settings.charging())
        checks = {"broker": connected, "database": database, "log": stores}
        admission = Admission(broker, Budgets(engine), terms, SystemClock(), keep=settings.reservation)
        api = build_api(Reports(engine), checks, settings.cors_origins, terms, admission)
        limit = BodyLimit(settings.max_body, "TAILRACE_BILLING_MAX_BODY")
        async with (
            authenticating(shared, settings.host, broker, SystemClock()) as authenticator,
            serving(
                entering(reading_bodies(api, limit, IMPORT_SECONDS), authenticator, settings.cors_origins, limit),
                settings.host,
                settings.port,
                connections=settings.connections,
                grace=lambda: stop.left(ANSWERS),
                tls=own_tls("billing", settings.tls_cert, settings.tls_key),
            ),
        ):
            log.info("billing listens", host=settings.host, port=settings.port, database=url.get_backend_name())

            async def work() -> None:
                if not await _prepared(engine, prices, settings, stop):
                    return
                migrated.set()
                async with _running(storage.run()), asyncio.TaskGroup() as group:
                    group.create_task(admission.run(stop), name="budgets")
                    reports = DeliveryReports(broker, Deliveries(engine), shared.topology().delivered())
                    group.create_task(reports.run(stop), name="deliveries")
                    group.create_task(_consume(broker, ledger, shared, settings, terms, stop), name="consumers")

            await until_drained(stop, work(), seconds=RELEASE_SECONDS)
    log.info("billing has stopped")


@asynccontextmanager
async def _running(work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    """Run ``work`` beside the block, and cancel it at the end of the block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        await end(task)


async def _load_prices(prices: Prices, settings: Settings) -> None:
    """Load the price book of the settings: the user's own file takes precedence over the shipped prices."""
    if settings.prices is not None:
        await load_price_file(prices, Path(settings.prices), SystemClock())
    await load_shipped_prices(prices, SystemClock(), wanted=settings.shipped_prices and settings.prices is None)


async def _consume(
    broker: Broker, ledger: Ledger, shared: Shared, settings: Settings, terms: CurrentTerms, stop: Stop
) -> None:
    """Consume every existing partition, including those beyond the configured number and those created later."""
    topology = shared.topology()
    wanted = {*range(topology.partitions), *await _existing(broker)}
    read: set[int] = set()
    async with asyncio.TaskGroup() as group:
        while not stop.is_set():
            for partition in sorted(wanted - read):
                tail = Tail(broker, topology, partition, batch=settings.batch, interval=settings.interval)
                consumer = Consumer(partition, tail, ledger, terms, SystemClock())
                group.create_task(consumer.run(stop), name=f"billing:{partition}")
            read |= wanted
            with suppress(TimeoutError):
                async with asyncio.timeout(PARTITIONS_SECONDS):
                    await stop.wait()
            wanted = await _existing(broker)


async def _existing(broker: Broker) -> set[int]:
    try:
        return set(await broker.partitions())
    except BrokerUnavailable as error:
        log.warning("partitions not listed", error=str(error))
        return set()


async def _prepared(engine: AsyncEngine, prices: Prices, settings: Settings, stop: Stop) -> bool:
    """Bring schema and price book up to date, waiting for the database; return False if stopped before.

    Raises:
        SettingsError: the price file cannot be used.
    """

    def waits(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("waits for the database", attempt=state.attempt_number, error=str(error))

    async def pause(seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await stop.wait()
        except TimeoutError:
            return

    async for attempt in tenacity.AsyncRetrying(
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=5.0),
        retry=tenacity.retry_if_exception_type(LedgerUnavailable),
        stop=lambda _state: stop.is_set(),
        sleep=pause,
        before_sleep=waits,
        retry_error_callback=lambda _state: None,
    ):
        with attempt:
            await migrate(engine)
            await _load_prices(prices, settings)
            return True
    return False


async def _count_reconnect() -> None:
    metrics.RECONNECTS.inc()


def _holder() -> str:
    return f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
