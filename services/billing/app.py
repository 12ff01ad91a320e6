"""Billing assembled: settings, and the running service."""

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Final, cast, get_args

import msgspec
import structlog
import tenacity
from sqlalchemy.ext.asyncio import AsyncEngine

from services.billing import metrics
from services.billing.adapters.budgets import Budgets
from services.billing.adapters.database import create_file, database_url, migrate, open_engine, sqlite_url
from services.billing.adapters.deliveries import Deliveries
from services.billing.adapters.ledger import Ledger
from services.billing.adapters.prices import Prices
from services.billing.adapters.reports import Reports
from services.billing.adapters.tail import Tail
from services.billing.admission import Admission
from services.billing.api import build_api
from services.billing.consumer import RELEASE_SECONDS, Consumer
from services.billing.core.charging import Basis, CallBasis, Charging
from services.billing.core.reconciliation import Policy, Tolerance
from services.billing.deliveries import DeliveryReports
from services.billing.errors import LedgerUnavailable
from services.billing.price_loading import load_price_file, load_shipped_prices
from services.billing.terms import CurrentTerms
from services.kit.auth.entrance import entering
from services.kit.auth.setup import authenticating
from services.kit.bodies import reading_bodies
from services.kit.broker import Broker, BrokerUnavailable
from services.kit.clock import SystemClock
from services.kit.http import serving
from services.kit.request_head import BodyLimit
from services.kit.settings import SettingsError, Shared, load_settings, own_tls
from services.kit.shutdown import ANSWERS, Stop, end, until_drained
from services.kit.storage import Storage
from services.kit.telemetry import configure_logging, describe_service

__all__ = ["Settings", "main"]

log = structlog.get_logger()
BASES: Final[tuple[str, ...]] = get_args(Basis)
IMPORT_SECONDS: Final = 300.0  # for the body of a provider's export
PARTITIONS_SECONDS: Final = 10.0
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of billing. Times in seconds, sizes in tokens or events.

    ``tls_cert`` and ``tls_key``: files for TLS.
    ``database_url``: ``sqlite:///…`` or ``postgresql://…``; without one a file ``billing.db`` in the data folder.
    ``tolerance_absolute`` and ``tolerance_relative``: counted and reported match when they differ by no more than the
    larger of the two. ``grace``: how long a provider may take to report. ``batch``, ``interval``: a transaction holds
    at most so many events and begins at most so long after the first of them. ``hold``: how long after a crash of the
    process that reads a partition another one takes over. ``max_body``: bytes of a price file or an export. ``drain``:
    how long the batch at hand may take after SIGTERM.

    ``reservation``: how long what was reserved in a budget waits for a generation that does not begin.

    ``prices``: a price file (TOML or CSV) that becomes the price book when its content is a new one.
    ``shipped_prices``: whether the prices that come with Tailrace hold until there is a price book of one's own.
    ``partial``: by which numbers generations are charged that failed, were cancelled or interrupted; ``abandoned``: the
    same for calls that did not become the answer; ``tenant_partial``: both for single tenants, as ``tenant=policy``.
    ``missing``: the same for completed ones whose provider never reported.
    ``tolerances``: other tolerances for some models, as ``provider/model=absolute/relative`` with ``*`` and ``?``.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)] = 8081
    tls_cert: str | None = None
    tls_key: str | None = None
    database_url: str | None = None
    tolerance_absolute: Annotated[int, msgspec.Meta(ge=0)] = 8
    tolerance_relative: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.02
    grace: Annotated[float, msgspec.Meta(ge=0)] = 300.0
    tolerances: list[str] = []
    prices: str | None = None
    shipped_prices: bool = True
    partial: Basis = "counted"
    abandoned: CallBasis = "provider"
    tenant_partial: list[str] = []
    missing: Basis = "counted"
    batch: Annotated[int, msgspec.Meta(ge=1, le=20_000)] = 10_000
    interval: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.5
    hold: Annotated[float, msgspec.Meta(ge=1)] = 5.0
    drain: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    reservation: Positive = 3_600.0
    connections: Annotated[int, msgspec.Meta(ge=1)] = 512
    max_body: Annotated[int, msgspec.Meta(ge=1_024)] = 67_108_864
    cors_origins: list[str] = []

    def __post_init__(self) -> None:
        if self.database_url is not None:
            try:
                database_url(self.database_url)
            except ValueError as error:
                raise ValueError(f"TAILRACE_BILLING_DATABASE_URL: {error}") from error
        self.policy()
        self.charging()

    def policy(self) -> Policy:
        """Return what reconciliation goes by.

        Raises:
            ValueError: a tolerance is not one.
        """
        return Policy(
            absolute=self.tolerance_absolute,
            relative=self.tolerance_relative,
            grace=self.grace,
            models=tuple(_tolerance(text) for text in self.tolerances),
        )

    def charging(self) -> Charging:
        """Return by whose numbers is charged.

        Raises:
            ValueError: a tenant's policy is not one.
        """
        pairs = [text.partition("=") for text in self.tenant_partial]
        wrong = [text for text, (_, _, basis) in zip(self.tenant_partial, pairs, strict=True) if basis not in BASES]
        if wrong:
            raise ValueError(f"TAILRACE_BILLING_TENANT_PARTIAL: {wrong[0]!r} is not tenant={'|'.join(BASES)}")
        tenants = {tenant: cast(Basis, basis) for tenant, _, basis in pairs}
        return Charging(partial=self.partial, missing=self.missing, abandoned=self.abandoned, tenants=tenants)


def _tolerance(text: str) -> Tolerance:
    model, _, numbers = text.rpartition("=")
    absolute, _, relative = numbers.partition("/")
    try:
        made = Tolerance(model=model, absolute=int(absolute), relative=float(relative))
        if not model or made.absolute < 0 or not 0 <= made.relative <= 1:
            raise ValueError("out of range")
    except ValueError as error:
        raise ValueError(
            f"TAILRACE_BILLING_TOLERANCES: {text!r} is not provider/model=tokens/share such as openai/gpt-*=8/0.02"
        ) from error
    return made


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
        await broker.keep(shared.topology())  # who calls is looked up there from the first request on
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
    """Run ``work`` beside the block, and end it with the block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        await end(task)


async def _load_prices(prices: Prices, settings: Settings) -> None:
    """Bring the price book up to date with the settings: a file of the user's own wins over what is shipped."""
    if settings.prices is not None:
        await load_price_file(prices, Path(settings.prices), SystemClock())
    await load_shipped_prices(prices, SystemClock(), wanted=settings.shipped_prices and settings.prices is None)


async def _consume(
    broker: Broker, ledger: Ledger, shared: Shared, settings: Settings, terms: CurrentTerms, stop: Stop
) -> None:
    """Read every partition that there is: also those beyond the present number, and those that appear later."""
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
        log.warning("partitions not looked at", error=str(error))
        return set()


async def _prepared(engine: AsyncEngine, prices: Prices, settings: Settings, stop: Stop) -> bool:
    """Bring schema and price book up to date, waiting for the database; ``False`` when stopped before.

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
