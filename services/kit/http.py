"""Serve an ASGI application on a port in our own event loop, and the probes of every service."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import prometheus_client
from litestar import MediaType, Response, Router, get

from services.kit.http1 import HEAD_BYTES, Http1Server
from services.kit.http2 import serving_http2
from services.kit.shutdown import end
from services.kit.tls import ServerTls

__all__ = ["Check", "HEAD_BYTES", "PortTaken", "RAW_SEND", "check_port", "probes", "serving"]

Check = Callable[[], Awaitable[bool]]
Grace = Callable[[], float]
"""Return the seconds that open responses may still take; called at shutdown."""
RAW_SEND: Final = "tailrace.send"
"""ASGI scope key of the server's own `send`, without the wrappers of ordinary responses."""
HANDSHAKE_SECONDS: Final = 10.0
GRACE_SECONDS: Final = 10.0
UNSENT_BYTES: Final = 128 * 1024


class PortTaken(Exception):
    """The address cannot be bound, usually because another process holds the port."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        self.host = host
        self.port = port
        super().__init__(f"cannot listen on {host}:{port}: {reason}")


def check_port(host: str, port: int, *, shared: bool = False) -> None:
    """Check that an address is free; ``shared``: or bound by processes that share it.

    Raises:
        PortTaken: it is not.
    """
    _bound(host, port, shared=shared).close()


@asynccontextmanager
async def serving(
    app: Any,
    host: str,
    port: int,
    *,
    connections: int = 4_096,
    grace: Grace = lambda: GRACE_SECONDS,
    tls: ServerTls | None = None,
    shared: bool = False,
    message_bytes: int = 65_536,
) -> AsyncIterator[None]:
    """Serve ``app`` (ASGI) over HTTP/1.1, WebSockets and HTTP/2 while the block runs.

    HTTP/2 is chosen by ALPN with ``tls``, and by prior knowledge without. ``shared``: other processes bind the port
    too, and the kernel distributes connections over them. At the end of the block no new connection is accepted, and
    open responses may take ``grace`` seconds more: the application must have ended its streams before. ``connections``
    bounds concurrent requests. A request's line and headers have at most `HEAD_BYTES` together in HTTP/1.1, and headers
    `services.kit.http2.HEADER_BYTES` in HTTP/2: more is answered with 431. Neither bounds bodies. ``message_bytes``:
    the largest message of a WebSocket.

    Raises:
        PortTaken: the address is in use.
    """
    listener = _bound(host, port, shared=shared)
    try:
        async with serving_http2(app, connections, grace=grace, scheme="https" if tls else "http") as http2:
            http1 = Http1Server(app, connections, http2.take, message_bytes=message_bytes)
            server = await asyncio.get_running_loop().create_server(
                http1.protocol,
                sock=listener,
                backlog=max(1_024, min(connections, 65_535)),
                ssl=tls.context(["h2", "http/1.1"]) if tls else None,
                ssl_handshake_timeout=HANDSHAKE_SECONDS if tls else None,
            )
            dating = asyncio.create_task(http1.keep_date())
            try:
                yield
            finally:
                server.close()
                seconds = grace()
                await asyncio.gather(http1.close(seconds), http2.close(seconds))
                await end(dating)
    finally:
        listener.close()


def _bound(host: str, port: int, *, shared: bool) -> socket.socket:
    """Return a bound socket; ``shared``: other processes may bind the same address.

    Raises:
        PortTaken: the address is in use.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if shared else socket.SO_REUSEADDR, 1)
        # Bound the kernel's send buffer for a client that does not read; connections inherit it.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise PortTaken(host, port, error.strerror or str(error)) from error
    return bound


def probes(checks: Mapping[str, Check]) -> Router:
    """Return ``/healthz`` (the process lives), ``/readyz`` (each check holds) and ``/metrics`` (Prometheus text)."""

    @get("/healthz", media_type=MediaType.JSON, summary="Liveness", operation_id="healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @get("/readyz", media_type=MediaType.JSON, summary="Readiness", operation_id="readyz", tags=["operations"])
    async def readyz() -> Response[dict[str, Any]]:
        results = {name: await _passes(check) for name, check in checks.items()}
        ready = all(results.values())
        return Response(
            {"status": "ok" if ready else "unavailable", "checks": results}, status_code=200 if ready else 503
        )

    @get("/metrics", summary="Metrics", operation_id="metrics", tags=["operations"], include_in_schema=False)
    async def metrics() -> Response[bytes]:
        return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return Router("/", route_handlers=[healthz, readyz, metrics])


async def _passes(check: Check) -> bool:
    try:
        async with asyncio.timeout(2.0):
            return await check()
    except Exception:  # a probe reports any failure as "not ready"; it must not fail itself
        return False
