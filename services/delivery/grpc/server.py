"""Run the gRPC server of the delivery process: a second port, with the same feeds as HTTP."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.delivery.grpc.service import SERVICE, DeliveryService
from services.kit.http import PortTaken, check_port
from services.kit.shutdown import end
from services.kit.tls import ServerTls

__all__ = ["serving_grpc"]

log = structlog.get_logger()

STREAMS_OF_A_CONNECTION: Final = 1_024
KEEPALIVE_MS: Final = 30_000
KEEPALIVE_TIMEOUT_MS: Final = 10_000
SHORTEST_PING_MS: Final = 10_000
METADATA_BYTES: Final = 16_384
HEALTH_SECONDS: Final = 1.0
GRACE_SECONDS: Final = 10.0
LAST_SECONDS: Final = 0.5
"""Seconds that the library may take to end its cancelled calls."""
_STATUS: Final = health_pb2.HealthCheckResponse


@asynccontextmanager
async def serving_grpc(
    delivery: DeliveryService,
    host: str,
    port: int,
    *,
    tls: ServerTls | None = None,
    max_request: int = 1_048_576,
    calls: int = 16_384,
    lifetime: float = 3_600.0,
    grace: Callable[[], float] = lambda: GRACE_SECONDS,
    shared: bool = False,
) -> AsyncIterator[int]:
    """Serve gRPC while the block runs; yield the port (``port`` 0: any free one).

    ``max_request``: most bytes of one request message. ``calls``: most concurrent calls. ``lifetime``: longest age of
    a connection in seconds. ``shared``: other processes may share the port. On exit, no new call is accepted and open
    calls have ``grace()`` seconds to end: their streams must have been stopped before.

    Raises:
        PortTaken: the address is in use.
    """
    if port:
        check_port(host, port, shared=shared)
    server = grpc.aio.server(options=_options(max_request, lifetime, shared), maximum_concurrent_rpcs=calls)
    server.add_generic_rpc_handlers((delivery.handlers(),))
    probe = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(probe, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_secure_port(address, _credentials(tls)) if tls else server.add_insecure_port(address)
    except RuntimeError as error:
        raise PortTaken(host, port, str(error)) from error
    await server.start()
    watch = asyncio.create_task(_report_health(delivery, probe), name="grpc-health")
    try:
        yield bound
    finally:
        await end(watch)
        await probe.enter_graceful_shutdown()
        seconds = grace()
        try:
            async with asyncio.timeout(seconds + LAST_SECONDS):
                await server.stop(seconds)
        except TimeoutError:
            log.warning("grpc server did not end in time", seconds=seconds)


def _options(max_request: int, lifetime: float, shared: bool) -> list[tuple[str, int]]:
    age = int(lifetime * 1_000)
    return [
        ("grpc.max_receive_message_length", max_request),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", STREAMS_OF_A_CONNECTION),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", SHORTEST_PING_MS),
        # A stream ends by itself within its lifetime; this ends the connection of a client that does not read.
        ("grpc.max_connection_age_ms", age),
        ("grpc.max_connection_age_grace_ms", age),
        ("grpc.so_reuseport", int(shared)),
    ]


def _credentials(tls: ServerTls) -> grpc.ServerCredentials:
    certificate, key = tls.read()
    return grpc.ssl_server_credentials([(key, certificate)])


async def _report_health(delivery: DeliveryService, probe: health.aio.HealthServicer) -> None:
    """Update the health service: for the server (the empty name) and for `SERVICE`."""
    while True:
        status = _STATUS.SERVING if delivery.is_ready() else _STATUS.NOT_SERVING
        for name in ("", SERVICE):
            await probe.set(name, status)
        await asyncio.sleep(HEALTH_SECONDS)
