"""Compose the delivery process, serve it over all transports, and shut it down."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from litestar import Litestar, asgi

from schemas.requests import ENVELOPE, GenerationRecord
from services.delivery.consumers.registry import Consumers
from services.delivery.fanout.feeds import Feeds
from services.delivery.fanout.presence import Presence
from services.delivery.fanout.streams import Streams
from services.delivery.fanout.supervisor import Supervisor
from services.delivery.http.asgi import detaching_streams
from services.delivery.http.completion import Completion
from services.delivery.http.console import console_handlers
from services.delivery.http.consumer_events import ConsumerEvents
from services.delivery.http.consumer_openapi import describe_consumer_events
from services.delivery.http.consumers import consumers_router
from services.delivery.http.dead import dead_router
from services.delivery.http.events import SessionEvents
from services.delivery.http.generations import router
from services.delivery.http.keys import keys_router
from services.delivery.http.openapi import describe_streams
from services.delivery.http.routes import events_handlers
from services.delivery.http.tickets import tickets_router
from services.delivery.log.states import LogStates
from services.delivery.reports.counting import DeliveryCounts
from services.delivery.reports.reporter import DeliveryReporter
from services.delivery.requests.budgets import BudgetReservations
from services.delivery.requests.deleted_sessions import DeletedSessions
from services.delivery.requests.deletion import Deletion
from services.delivery.requests.generations import Lookups
from services.delivery.requests.intake import Intake
from services.delivery.requests.recent_starts import RecentStarts
from services.delivery.requests.size_limit import request_limit
from services.delivery.requests.start_limits import StartLimits
from services.delivery.settings import Settings
from services.delivery.websocket.handler import WebSockets
from services.kit.api_docs import documented
from services.kit.auth.authenticator import Authenticator
from services.kit.auth.config import authenticating
from services.kit.auth.guards import cors
from services.kit.auth.middleware import entering
from services.kit.body_limit import reading_bodies
from services.kit.clock import Clock, SystemClock
from services.kit.http import Check, probes, serving
from services.kit.jetstream.broker import Broker
from services.kit.jetstream.storage import Storage
from services.kit.problem import EXCEPTION_HANDLERS
from services.kit.settings import SettingsError, Shared, load_settings, own_tls
from services.kit.shutdown import ANSWERS, HAND_OVER, Stop, end
from services.kit.telemetry import configure_logging, describe_service
from services.kit.tls import ServerTls

__all__ = ["Replica", "build_app", "main"]

log = structlog.get_logger()


async def main(stop: Stop, *, worker: int | None = None) -> None:
    """Run delivery until ``stop``, then end all streams with a resumable notice.

    ``worker``: the number of this process among the workers that share the ports; its probes have a separate port.

    Raises:
        SettingsError: a setting is wrong.
        BrokerUnavailable: no broker answers at start.
        PortTaken: the port is in use.
    """
    shared, settings = load_settings(Settings, "delivery", os.environ)
    stop.drain = settings.drain
    configure_logging("delivery", shared.log_level, shared.log_format)
    describe_service("delivery", shared.described())
    tls = own_tls("delivery", settings.tls_cert, settings.tls_key)
    async with Broker.connect(shared.nats_url, "delivery", tls=shared.tls()) as broker:
        await broker.keep(shared.topology())
        _compare_limits(settings.max_body, broker)
        clock = SystemClock()
        reporter = DeliveryReporter(broker.publish_stored, f"d{secrets.token_hex(8)}")
        replica = Replica(broker, clock, shared, settings, DeliveryCounts(reporter))
        drained = asyncio.Event()
        async with (
            authenticating(shared, settings.host, broker, clock) as authenticator,
            serving(
                build_app(replica, authenticator),
                settings.host,
                settings.port,
                connections=settings.connections,
                grace=lambda: stop.left(ANSWERS),
                tls=tls,
                shared=worker is not None,
                message_bytes=settings.max_body + ENVELOPE,
            ),
            _serving_grpc(replica, authenticator, tls, stop, shared_port=worker is not None),
            _own_probes(replica, worker, stop),
            asyncio.TaskGroup() as group,
        ):
            supervising = group.create_task(replica.run())
            reporting = group.create_task(reporter.run(drained))
            await stop.wait()
            await replica.drain(stop.left())
            drained.set()
            await asyncio.wait({reporting}, timeout=stop.left(HAND_OVER))
            await end(supervising, reporting)


class Replica:
    """Hold the parts of one delivery process, built once and shared by all its transports.

    ``counts``: counts delivered events for billing; ``None`` counts nothing.
    """

    def __init__(
        self,
        broker: Broker,
        clock: Clock,
        shared: Shared,
        settings: Settings,
        counts: DeliveryCounts | None = None,
    ) -> None:
        self.broker = broker
        self.clock = clock
        self.settings = settings
        self.pool = shared.pool
        self.limit = request_limit(settings.max_body, broker.client.max_payload)
        self.storage = Storage(broker, "delivery")
        self.states = LogStates(broker, clock, shared.partitions)
        self.supervisor = Supervisor(broker, clock, settings)
        self.deleted = DeletedSessions(broker)
        self.presence = Presence(broker)
        self.feeds = Feeds(broker, clock, self.states, self.supervisor, self.deleted, settings, counts)
        self.lookups = Lookups(broker, clock, self.states.partition)
        self.starts = StartLimits(broker, clock, settings)
        self.recent = RecentStarts(clock)
        self.deleted.on_deleted(self.recent.forget)
        self.admission = BudgetReservations(
            broker, clock, output=settings.budget_output, fallback=settings.budget_fallback
        )
        self.intake = Intake(
            broker,
            clock,
            self.states,
            self.storage,
            self.lookups,
            self.deleted,
            self.starts,
            self.recent,
            self.admission,
            shared.pool,
        )
        self.streams = Streams(self.feeds, self.states, self.supervisor, self.presence, self.lookups, self.recent)
        self.consumers = Consumers(broker, clock, self.states, self.supervisor, settings)
        self.deletion = Deletion(
            broker,
            clock,
            self.states,
            self.lookups,
            self.intake,
            self.deleted,
            self.consumers.dead.forget_session,
            shared.pool,
        )
        self.supervisor.every_second("storage", self.storage.poll)
        self.supervisor.every_second("starts", self.starts.poll)
        self.supervisor.every_second("deletions", self.deleted.listen)

    async def run(self) -> None:
        """Supervise streams and keep feeds in step with the log until cancelled."""
        self.supervisor.start("deletions", self.deleted.listen())
        await self.supervisor.run()

    async def drain(self, seconds: float) -> None:
        """End every stream with a resumable notice, wait at most ``seconds`` for slow clients, and close all feeds."""
        await self.supervisor.drain(seconds)
        await self.feeds.close()
        await self.supervisor.close()

    def checks(self) -> dict[str, Check]:
        """Return the readiness checks by name."""

        async def is_ready() -> bool:
            return self.supervisor.is_ready()

        async def stores() -> bool:
            return self.storage.stores()

        return {"broker": is_ready, "log": stores}


def _compare_limits(max_body: int, broker: Broker) -> None:
    limit = request_limit(max_body, broker.client.max_payload)
    if limit.size < max_body:
        log.warning(
            "body limit was lowered below max_body to fit the broker's max_payload",
            max_body=max_body,
            max_payload=broker.client.max_payload,
            limit=limit.size,
            needed=max_body + ENVELOPE,
        )


@asynccontextmanager
async def _serving_grpc(
    replica: Replica, authenticator: Authenticator, tls: ServerTls | None, stop: Stop, *, shared_port: bool
) -> AsyncIterator[None]:
    """Serve gRPC while the block runs, if ``settings.grpc_port`` is set."""
    settings = replica.settings
    if not settings.grpc_port:
        yield
        return
    # Imported lazily: a replica without gRPC does not load its library.
    try:
        from services.delivery.grpc.server import serving_grpc
        from services.delivery.grpc.service import DeliveryService
    except ImportError as error:
        hint = "it needs the C++ runtime libstdc++; 0 serves no gRPC"
        raise SettingsError([f"TAILRACE_DELIVERY_GRPC_PORT: gRPC cannot be loaded ({error}): {hint}"]) from error

    service = DeliveryService(
        replica.supervisor,
        replica.streams,
        replica.lookups,
        replica.intake,
        replica.consumers,
        authenticator.authenticate,
    )
    async with serving_grpc(
        service,
        settings.host,
        settings.grpc_port,
        tls=tls,
        max_request=replica.limit.size,
        calls=settings.connections,
        lifetime=settings.lifetime,
        grace=lambda: stop.left(ANSWERS),
        shared=shared_port,
    ):
        yield


@asynccontextmanager
async def _own_probes(replica: Replica, worker: int | None, stop: Stop) -> AsyncIterator[None]:
    """Answer probes on the worker's own port while the block runs."""
    if worker is None:
        yield
        return
    settings = replica.settings
    app = Litestar([probes(replica.checks())], openapi_config=None, logging_config=None)
    port, grace = settings.workers_port + worker, lambda: stop.left(ANSWERS)
    async with serving(app, settings.host, port, connections=64, grace=grace):
        yield


def build_app(replica: Replica, authenticator: Authenticator) -> Any:
    """Return the ASGI application of a replica."""
    settings, limit = replica.settings, replica.limit
    authenticator.on_revoked(replica.supervisor.open_streams.revoke)
    completion = Completion(replica.streams, settings.wait)
    events = SessionEvents(
        replica.streams,
        replica.lookups,
        completion,
        max_wait=settings.wait,
        heartbeat=settings.heartbeat,
        compress=settings.compress,
    )
    consumer_events = ConsumerEvents(replica.consumers, replica.supervisor, replica.clock, settings)
    sockets = WebSockets(
        replica.clock, replica.supervisor, settings, replica.streams, replica.intake, replica.consumers, limit
    )

    @asgi("/v1/ws", copy_scope=False)
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await sockets(scope, receive, send)

    handlers: list[Any] = [
        router(replica.intake, replica.lookups, events, completion, replica.deletion),
        dead_router(replica.intake, replica.broker, replica.pool),
        keys_router(authenticator, replica.clock),
        tickets_router(authenticator, replica.clock, settings.ticket),
        *events_handlers(events),
        websocket,
        consumers_router(replica.consumers, consumer_events),
        probes(replica.checks()),
    ]
    if settings.console:
        handlers += console_handlers(settings, asks=authenticator.everybody is None)
    litestar = Litestar(
        route_handlers=handlers,
        exception_handlers=EXCEPTION_HANDLERS,
        request_max_body_size=None,  # see `reading_bodies`
        logging_config=None,
        cors_config=cors(settings.cors_origins, ["GET", "POST", "PUT", "PATCH", "DELETE"]),
        openapi_config=documented(
            "Tailrace delivery", "Ask models, and watch their answers as resumable streams.", "/docs"
        ),
        signature_types=[GenerationRecord],
    )
    describe_streams(litestar.openapi_schema)
    describe_consumer_events(litestar.openapi_schema)

    return detaching_streams(entering(reading_bodies(litestar, limit), authenticator, settings.cors_origins, limit))
