"""The producer process: settings, its parts put together, and its probes."""

import asyncio
import os
from contextlib import suppress
from typing import Annotated, Final, Literal

import msgspec
import structlog
from litestar import Litestar
from litestar.openapi import OpenAPIConfig

from services.kit.broker import Broker
from services.kit.clock import SystemClock
from services.kit.http import probes, serving
from services.kit.problem import EXCEPTION_HANDLERS
from services.kit.settings import SettingsError, Shared, load_settings, read_config
from services.kit.shutdown import ANSWERS, Stop, end
from services.kit.storage import Storage
from services.kit.telemetry import configure_logging, describe_service
from services.producer.adapters.circuits import Circuits
from services.producer.adapters.publisher import Publisher
from services.producer.adapters.records import Records
from services.producer.adapters.upstreams import Upstreams as HttpUpstreams
from services.producer.asking import Upstreams
from services.producer.core.bounds import EVENT_BYTES
from services.producer.core.deadlines import Deadlines
from services.producer.core.registry import Registry, RegistryError
from services.producer.core.retry import RetryPolicy
from services.producer.gate import Gates
from services.producer.late_usage import LateUsage
from services.producer.relay import Outside
from services.producer.worker import Worker

__all__ = ["Settings", "main"]

Positive = Annotated[float, msgspec.Meta(gt=0)]
FLUSH_SECONDS: Final = 0.5
LEAST_PAYLOAD: Final = 2 * EVENT_BYTES
log = structlog.get_logger()


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the producer. Times in seconds.

    ``slots``: how many generations run at once in one process. ``drain``: how long running ones may go on after
    SIGTERM. ``connect``, ``first_token``, ``between_tokens`` and ``total`` are deadlines of each call.
    """

    host: str = "127.0.0.1"
    port: int = 8082
    slots: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1_000
    drain: Annotated[float, msgspec.Meta(ge=0)] = 20.0
    connect: Positive = 10.0
    first_token: Positive = 30.0
    between_tokens: Positive = 30.0
    total: Positive = 900.0
    ack_timeout: Positive = 2.0
    append_timeout: Positive = 60.0
    retry_attempts: Annotated[int, msgspec.Meta(ge=1, le=20)] = 3
    retry_wait: Literal["exponential", "linear"] = "exponential"
    retry_base: Positive = 0.5
    retry_maximum: Positive = 20.0
    circuit_failures: Annotated[int, msgspec.Meta(ge=1)] = 5
    circuit_seconds: Positive = 15.0

    def retry(self) -> RetryPolicy:
        """Return how often and after which pauses a call is made again."""
        return RetryPolicy(
            max_attempts=self.retry_attempts, wait=self.retry_wait, base=self.retry_base, maximum=self.retry_maximum
        )

    def deadlines(self) -> Deadlines:
        """Return the deadlines that hold where a model has none of its own."""
        return Deadlines(
            connect=self.connect,
            first_token=self.first_token,
            between_tokens=self.between_tokens,
            total=self.total,
        )


async def main(stop: Stop) -> None:
    """Run the producer until ``stop``.

    Raises:
        SettingsError: a setting or the model registry is wrong.
        BrokerUnavailable: no broker answers at start.
        PortTaken: the probes' port is in use.
    """
    shared, settings = load_settings(Settings, "producer", os.environ)
    stop.drain = settings.drain
    configure_logging("producer", shared.log_level, shared.log_format)
    describe_service("producer", shared.described())
    try:
        registry = Registry.load(read_config(os.environ), os.environ)
    except RegistryError as error:
        raise SettingsError(error.problems) from error
    clock = SystemClock()
    async with (
        Broker.connect(shared.nats_url, "producer", tls=shared.tls()) as broker,
        HttpUpstreams.opened(registry, clock) as upstreams,
    ):
        await broker.keep(shared.topology())
        if broker.client.max_payload < LEAST_PAYLOAD:
            log.warning(
                "the broker takes too small messages: an answer with a larger event would not be stored",
                max_payload=broker.client.max_payload,
                needed=LEAST_PAYLOAD,
            )
        publisher = Publisher(broker, ack_timeout=settings.ack_timeout, give_up=settings.append_timeout)
        records = Records(broker)
        circuits = Circuits(broker, settings.circuit_failures, settings.circuit_seconds)
        await publisher.start()
        outside = Outside(
            broker=broker,
            publisher=publisher,
            records=records,
            registry=registry,
            late_usage=LateUsage(broker, publisher, clock),
            upstreams=Upstreams(upstreams.of, circuits, Gates(), settings.retry(), settings.deadlines()),
            clock=clock,
            partitions=shared.partitions,
        )
        await _work(shared, settings, outside, stop)


async def _work(shared: Shared, settings: Settings, outside: Outside, stop: Stop) -> None:
    worker = Worker(outside, shared.pool, settings.slots, shared.lease, shared.max_deliver)
    registry = outside.registry
    await outside.records.announce(shared.pool, registry.announcement())

    storage = Storage(outside.broker, "producer", outside.publisher.is_stuck)

    async def connected() -> bool:
        return outside.broker.is_connected

    async def stores() -> bool:
        return storage.stores()

    app = Litestar(
        route_handlers=[probes({"broker": connected, "log": stores})],
        exception_handlers=EXCEPTION_HANDLERS,
        logging_config=None,
        openapi_config=OpenAPIConfig("Tailrace producer", "1"),
    )
    async with (
        serving(app, settings.host, settings.port, grace=lambda: stop.left(ANSWERS)),
        asyncio.TaskGroup() as group,
    ):
        circuits = outside.upstreams.circuits
        works = (outside.publisher.watch(), outside.records.write(), circuits.follow(), storage.run())
        background = [group.create_task(work) for work in works]
        await worker.run(stop)
        await end(*background)
        await outside.late_usage.close()
        with suppress(TimeoutError):  # look-ups may be away; the log is the truth
            async with asyncio.timeout(min(FLUSH_SECONDS, stop.left(ANSWERS))):
                await outside.records.flush()
