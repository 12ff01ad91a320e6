"""The gRPC server of the delivery process: one port beside HTTP's, over the same feeds."""

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
"""How long the library may take to end the calls that it has cancelled."""
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
    """Serve gRPC while the block runs; yields the port (0 asks for any).

    ``max_request``: bytes of one request message. ``calls``: at once.
    ``lifetime``: seconds after which a connection is to be made anew. ``shared``: other processes may have the port
    too. On leaving, no new call is accepted and open ones may end within what ``grace`` returns then, in seconds: their
    streams must have been told before.

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
            log.warning("gRPC server did not end in time", seconds=seconds)


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
        # A stream ends by itself within its lifetime; whatever is left of a client that takes nothing ends with this.
        ("grpc.max_connection_age_ms", age),
        ("grpc.max_connection_age_grace_ms", age),
        ("grpc.so_reuseport", int(shared)),
    ]


def _credentials(tls: ServerTls) -> grpc.ServerCredentials:
    certificate, key = tls.read()
    return grpc.ssl_server_credentials([(key, certificate)])


async def _report_health(delivery: DeliveryService, probe: health.aio.HealthServicer) -> None:
    """Keep the health service up to date: as a whole (the empty name) and for the one service."""
    while True:
        status = _STATUS.SERVING if delivery.is_ready() else _STATUS.NOT_SERVING
        for name in ("", SERVICE):
            await probe.set(name, status)
        await asyncio.sleep(HEALTH_SECONDS)
