"""The delivery process: settings, its parts put together, and its shutdown."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import structlog
from litestar import Litestar, MediaType, Response, asgi, get, route
from litestar.datastructures import CacheControlHeader
from litestar.static_files import create_static_files_router

from schemas.requests import ENVELOPE, GenerationRecord
from services.delivery.consumers.api import consumers_router
from services.delivery.consumers.describe import describe_consumer_events
from services.delivery.consumers.registry import Consumers
from services.delivery.fanout.hub import Hub
from services.delivery.fanout.streams import Streams
from services.delivery.http.asgi import outliving
from services.delivery.http.completion import Completion
from services.delivery.http.dead import dead_router
from services.delivery.http.events import SessionEvents
from services.delivery.http.generations import router
from services.delivery.http.keys import keys_router
from services.delivery.http.openapi import describe_streams
from services.delivery.http.routes import events_handlers
from services.delivery.http.tickets import tickets_router
from services.delivery.reports.counting import Accounts
from services.delivery.reports.reporter import Delivered
from services.delivery.requests.budgets import Admission
from services.delivery.requests.deletion import Deletion
from services.delivery.requests.generations import Lookups
from services.delivery.requests.intake import Intake
from services.delivery.requests.size_limit import request_limit
from services.delivery.settings import Settings
from services.delivery.websocket.handler import WebSockets
from services.kit.api_docs import documented
from services.kit.auth.authenticator import Authenticator
from services.kit.auth.entrance import entering
from services.kit.auth.rules import cors
from services.kit.auth.setup import authenticating
from services.kit.bodies import reading_bodies
from services.kit.clock import SystemClock
from services.kit.http import Check, probes, serving
from services.kit.jetstream.broker import Broker
from services.kit.problem import EXCEPTION_HANDLERS
from services.kit.settings import SettingsError, Shared, load_settings, own_tls
from services.kit.shutdown import ANSWERS, HAND_OVER, Stop, end
from services.kit.telemetry import configure_logging, describe_service
from services.kit.tls import ServerTls

__all__ = ["build_app", "main"]

log = structlog.get_logger()
_CONSOLE: Final = Path(__file__).parent / "console"
_CONSOLE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src {connect}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def main(stop: Stop, *, worker: int | None = None) -> None:
    """Run delivery until ``stop``, then end all streams with a resumable notice.

    ``worker``: the number of this process among those that share the ports; its probes have a port of their own too.

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
        hub = Hub(broker, clock, shared.partitions, settings.limits())
        consumers = Consumers(hub, settings.consumer_limits())
        delivered = Delivered(broker.publish_stored, f"d{secrets.token_hex(8)}")
        drained = asyncio.Event()
        hub.accounts = Accounts(delivered)
        async with (
            authenticating(shared, settings.host, broker, clock) as authenticator,
            serving(
                build_app(hub, shared, settings, authenticator, consumers),
                settings.host,
                settings.port,
                connections=settings.connections,
                grace=lambda: stop.left(ANSWERS),
                tls=tls,
                shared=worker is not None,
                message_bytes=settings.max_body + ENVELOPE,
            ),
            _serving_grpc(hub, shared, settings, authenticator, consumers, tls, stop, shared_port=worker is not None),
            _own_probes(hub, settings, worker, stop),
            asyncio.TaskGroup() as group,
        ):
            sweeper = group.create_task(hub.run())
            reporting = group.create_task(delivered.run(drained))
            await stop.wait()
            await hub.drain(stop.left())
            drained.set()
            await asyncio.wait({reporting}, timeout=stop.left(HAND_OVER))
            await end(sweeper, reporting)


def _compare_limits(max_body: int, broker: Broker) -> None:
    limit = request_limit(max_body, broker.client.max_payload)
    if limit.size < max_body:
        log.warning(
            "the broker takes smaller messages than max_body allows: the limit is lowered",
            max_body=max_body,
            max_payload=broker.client.max_payload,
            limit=limit.size,
            needed=max_body + ENVELOPE,
        )


@asynccontextmanager
async def _serving_grpc(
    hub: Hub,
    shared: Shared,
    settings: Settings,
    authenticator: Authenticator,
    consumers: Consumers,
    tls: ServerTls | None,
    stop: Stop,
    *,
    shared_port: bool,
) -> AsyncIterator[None]:
    """Serve gRPC while the block runs, where it is wanted."""
    if not settings.grpc_port:
        yield
        return
    # Only here: who does without gRPC shall not pay for its library.
    try:
        from services.delivery.grpc.server import serving_grpc
        from services.delivery.grpc.service import Delivery
    except ImportError as error:
        hint = "it needs the C++ runtime libstdc++; 0 serves no gRPC"
        raise SettingsError([f"TAILRACE_DELIVERY_GRPC_PORT: gRPC cannot be loaded ({error}): {hint}"]) from error

    lookups = Lookups(hub.broker, hub.clock, hub.partition)
    intake = Intake(hub.broker, hub, lookups, hub.clock, shared.pool, _admission(hub, settings))
    async with serving_grpc(
        Delivery(hub, Streams(hub, lookups), lookups, intake, consumers, authenticator.authenticate),
        settings.host,
        settings.grpc_port,
        tls=tls,
        max_request=request_limit(settings.max_body, hub.broker.client.max_payload).size,
        calls=settings.connections,
        lifetime=settings.lifetime,
        grace=lambda: stop.left(ANSWERS),
        shared=shared_port,
    ):
        yield


@asynccontextmanager
async def _own_probes(hub: Hub, settings: Settings, worker: int | None, stop: Stop) -> AsyncIterator[None]:
    """Answer probes on a port that no other worker has, while the block runs."""
    if worker is None:
        yield
        return
    app = Litestar([probes(_checks(hub))], openapi_config=None, logging_config=None)
    port, grace = settings.workers_port + worker, lambda: stop.left(ANSWERS)
    async with serving(app, settings.host, port, connections=64, grace=grace):
        yield


def _admission(hub: Hub, settings: Settings) -> Admission:
    return Admission(hub.broker, hub.clock, output=settings.budget_output, fallback=settings.budget_fallback)


def _checks(hub: Hub) -> dict[str, Check]:
    async def stores() -> bool:
        return hub.storage.stores()

    return {"broker": hub.is_ready, "log": stores}


def build_app(
    hub: Hub, shared: Shared, settings: Settings, authenticator: Authenticator, consumers: Consumers | None = None
) -> Any:
    """Return the ASGI application. ``consumers``: where gRPC shares them."""
    authenticator.on_revoked(hub.connections.revoke)
    lookups = Lookups(hub.broker, hub.clock, hub.partition)
    intake = Intake(hub.broker, hub, lookups, hub.clock, shared.pool, _admission(hub, settings))
    streams = Streams(hub, lookups)
    completion = Completion(streams, settings.wait)
    consumers = consumers or Consumers(hub, settings.consumer_limits())
    events = SessionEvents(
        streams, lookups, completion, max_wait=settings.wait, heartbeat=settings.heartbeat, compress=settings.compress
    )
    limit = request_limit(settings.max_body, hub.broker.client.max_payload)
    sockets = WebSockets(hub, streams, intake, consumers, limit)

    @asgi("/v1/ws", copy_scope=False)
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await sockets(scope, receive, send)

    handlers: list[Any] = [
        router(intake, lookups, completion, Deletion(hub, lookups, intake, shared.pool)),
        dead_router(intake, hub.broker, shared.pool),
        keys_router(authenticator, hub.clock),
        tickets_router(authenticator, hub.clock, settings.ticket),
        *events_handlers(events),
        websocket,
        consumers_router(consumers),
        probes(_checks(hub)),
    ]
    if settings.console:
        handlers += _console(settings, asks=authenticator.everybody is None)
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

    return outliving(entering(reading_bodies(litestar, limit), authenticator, settings.cors_origins, limit))


def _console(settings: Settings, *, asks: bool) -> list[Any]:
    """Return the page and its parts; ``asks``: whether it has to ask for a key."""
    connect = "'self'" + (f" {settings.billing_url}" if settings.billing_url else "")
    headers = {
        "Content-Security-Policy": _CONSOLE_POLICY.format(connect=connect),
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @route("/", http_method=["GET", "HEAD"], include_in_schema=False, sync_to_thread=False)
    def page() -> Response[bytes]:
        return Response((_CONSOLE / "index.html").read_bytes(), media_type=MediaType.HTML, headers=headers)

    @route("/console/usage", http_method=["GET", "HEAD"], include_in_schema=False, sync_to_thread=False)
    def usage_page() -> Response[bytes]:
        return Response((_CONSOLE / "usage.html").read_bytes(), media_type=MediaType.HTML, headers=headers)

    @get("/console/config.json", include_in_schema=False, sync_to_thread=False)
    def config() -> dict[str, Any]:
        return {"billing": settings.billing_url, "models": settings.console_models, "credentials": asks}

    files = create_static_files_router(
        "/console", [_CONSOLE], include_in_schema=False, cache_control=CacheControlHeader(no_cache=True)
    )
    return [page, usage_page, config, files]
