"""The producer process: compose its parts from the settings, and serve its probes."""

import asyncio
import os
from contextlib import suppress
from typing import Final

import structlog
from litestar import Litestar
from litestar.openapi import OpenAPIConfig

from services.kit.clock import SystemClock
from services.kit.http import probes, serving
from services.kit.jetstream.broker import Broker
from services.kit.jetstream.storage import Storage
from services.kit.problem import EXCEPTION_HANDLERS
from services.kit.settings import Shared
from services.kit.shutdown import ANSWERS, Stop, end
from services.kit.tasks import together
from services.kit.telemetry import configure_logging, describe_service
from services.producer.adapters.circuits import Circuits
from services.producer.adapters.publisher import Publisher
from services.producer.adapters.records import Records
from services.producer.adapters.upstreams import Upstreams
from services.producer.call import CallContext
from services.producer.core.bounds import EVENT_BYTES
from services.producer.core.counting import load_encodings
from services.producer.late_usage import LateUsage
from services.producer.relay import RelayContext
from services.producer.settings import Settings, load_producer_settings
from services.producer.upstream_limits import UpstreamLimits
from services.producer.worker import Worker

__all__ = ["main"]

FLUSH_SECONDS: Final = 0.5
LEAST_PAYLOAD: Final = 2 * EVENT_BYTES
log = structlog.get_logger()


async def main(stop: Stop) -> None:
    """Run the producer until ``stop``.

    Raises:
        SettingsError: a setting or the model registry is wrong.
        BrokerUnavailable: no broker answers at start.
        PortTaken: the probes' port is in use.
    """
    shared, settings, registry = load_producer_settings(os.environ)
    stop.drain = settings.drain
    configure_logging("producer", shared.log_level, shared.log_format)
    describe_service("producer", shared.described())
    clock = SystemClock()
    async with (
        Broker.connect(shared.nats_url, "producer", tls=shared.tls()) as broker,
        Upstreams.opened(registry, clock) as upstreams,
    ):
        # Ready means that the first request is as fast as the next one: vocabularies load while the broker is set up.
        await together(asyncio.to_thread(load_encodings, registry.encodings()), broker.keep(shared.topology()))
        if broker.client.max_payload < LEAST_PAYLOAD:
            log.warning(
                "message limit of the broker is too small for the largest events",
                max_payload=broker.client.max_payload,
                needed=LEAST_PAYLOAD,
            )
        publisher = Publisher(broker, ack_timeout=settings.ack_timeout, give_up=settings.append_timeout)
        records = Records(broker)
        circuits = Circuits(broker, settings.circuit_failures, settings.circuit_seconds)
        await publisher.start()
        context = RelayContext(
            broker=broker,
            publisher=publisher,
            records=records,
            registry=registry,
            late_usage=LateUsage(broker, publisher, clock),
            calls=CallContext(upstreams.of, circuits, UpstreamLimits(), settings.retry(), settings.deadlines()),
            clock=clock,
            partitions=shared.partitions,
        )
        await _work(shared, settings, context, stop)


async def _work(shared: Shared, settings: Settings, context: RelayContext, stop: Stop) -> None:
    worker = Worker(context, shared.pool, settings.slots, shared.lease, shared.max_deliver)
    registry = context.registry
    await context.records.announce(shared.pool, registry.announcement())

    storage = Storage(context.broker, "producer", context.publisher.is_stuck)

    async def connected() -> bool:
        return context.broker.is_connected

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
        circuits = context.calls.circuits
        works = (context.publisher.watch(), context.records.write(), circuits.follow(), storage.run())
        background = [group.create_task(work) for work in works]
        await worker.run(stop)
        await end(*background)
        await context.late_usage.close()
        with suppress(TimeoutError):  # the look-up bucket may be unavailable; the log is authoritative
            async with asyncio.timeout(min(FLUSH_SECONDS, stop.left(ANSWERS))):
                await context.records.flush()
