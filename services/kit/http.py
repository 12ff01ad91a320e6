"""Serving an ASGI application with granian inside our own event loop, and the probes that every service answers."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import prometheus_client
from granian.constants import Interfaces, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings
from granian.server.embed import Server
from litestar import MediaType, Response, Router, get

from services.kit.tls import ServerTls

__all__ = ["HEAD_BYTES", "PortTaken", "check_port", "probes", "serving"]

Check = Callable[[], Awaitable[bool]]
_STARTUP_TIMEOUT: Final = 10.0
STREAMS_OF_A_CONNECTION: Final = 1_024
HEAD_BYTES: Final = 8_192  # the least there is; the server reserves it for every connection of HTTP/1.1, idle ones too
HEADER_BYTES: Final = 65_536
HEADER_MS: Final = 10_000
LAST_SECONDS: Final = 5.0


class PortTaken(Exception):
    """The address cannot be bound, usually because another process holds the port."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        self.host = host
        self.port = port
        super().__init__(f"cannot listen on {host}:{port}: {reason}")


def check_port(host: str, port: int, *, shared: bool = False) -> None:
    """Find out whether an address is free; ``shared``: or had by processes that share it.

    Raises:
        PortTaken: it is not.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if shared else socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortTaken(host, port, error.strerror or str(error)) from error


@asynccontextmanager
async def serving(
    app: Any,
    host: str,
    port: int,
    *,
    connections: int = 4_096,
    grace: float = 10.0,
    tls: ServerTls | None = None,
    shared: bool = False,
) -> AsyncIterator[None]:
    """Serve ``app`` (ASGI) over HTTP/1.1 and HTTP/2 while the block runs.

    HTTP/2 is chosen by ALPN with ``tls``, and by prior knowledge without. ``shared``: other processes have the port
    too, and the kernel spreads connections over them. On leaving, no new connection is accepted and open answers may
    end within ``grace`` seconds: the application must have told its streams to end before. ``connections`` bounds
    concurrent requests. A request's line and headers have at most `HEAD_BYTES` together in HTTP/1.1, and headers
    `HEADER_BYTES` in HTTP/2: more is answered with 431. Neither bounds bodies.

    Raises:
        PortTaken: the address is in use.
    """
    check_port(host, port, shared=shared)
    logging.getLogger("_granian").setLevel(logging.ERROR)
    server = Server(
        app,
        address=host,
        port=port,
        interface=Interfaces.ASGINL,
        backlog=max(1_024, min(connections, 65_535)),
        backpressure=connections,
        log_enabled=False,
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_MS, max_buffer_size=HEAD_BYTES),
        http2_settings=HTTP2Settings(max_concurrent_streams=STREAMS_OF_A_CONNECTION, max_headers_size=HEADER_BYTES),
        ssl_cert=tls.certificate if tls else None,
        ssl_key=tls.key if tls else None,
        ssl_protocol_min=SSLProtocols.tls12,
    )
    task = asyncio.create_task(server.serve(), name=f"http:{port}")
    try:
        await _wait_until_listening(host, port, task)
        yield
    finally:
        server.stop()  # type: ignore[no-untyped-call]  # granian ships no annotation for it
        _done, late = await asyncio.wait({task}, timeout=grace)
        for unfinished in late:
            unfinished.cancel()
        done, _late = await asyncio.wait({task}, timeout=LAST_SECONDS)  # the server may heed neither; we leave anyway
        await asyncio.gather(*done, return_exceptions=True)


async def _wait_until_listening(host: str, port: int, task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(_STARTUP_TIMEOUT):
        while True:
            if task.done():
                task.result()
                raise RuntimeError("the HTTP server ended while it started")
            try:
                _reader, writer = await asyncio.open_connection(host, port)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            return


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
