"""Settings of delivery."""

from typing import Annotated, Literal

import msgspec

from schemas.requests import ENVELOPE, LARGEST_PAYLOAD

__all__ = ["Fallback", "Settings"]

Fallback = Literal["refuse", "allow"]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Configure delivery. Times in seconds, sizes in bytes.

    ``grpc_port``: port of gRPC (0: off). ``tls_cert`` and ``tls_key``: files for TLS on both ports.
    ``workers``: processes that share the ports; ``workers_port``: port of the supervising process's probes and
    metrics; worker N uses ``workers_port`` + N. ``connections``: concurrent requests and streams of one process.
    ``max_body``: bound of a request's body, a WebSocket message and a gRPC message; the broker's ``max_payload`` may
    lower it. ``feed_bytes``: bytes of events kept in memory for one session. ``wait``: longest wait of a poll.
    ``compress``: gzip for events over HTTP.

    ``consumers``: durable consumers of one tenant; each is deleted after ``consumer_inactive`` without a reader
    (0: never), and keeps at most ``consumer_dead`` dead events. ``cors_origins``: origins whose pages may call
    this API. ``budget_output``: output tokens reserved for a request that sets no maximum.
    ``budget_fallback``: whether tenants with budgets may start generations while billing does not answer.
    ``billing_url`` and ``console_models`` are passed to the console page.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 0
    tls_cert: str | None = None
    tls_key: str | None = None
    workers: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    workers_port: Annotated[int, msgspec.Meta(ge=1, le=65_000)] = 8_100
    connections: Annotated[int, msgspec.Meta(ge=1)] = 16_384
    max_body: Annotated[int, msgspec.Meta(ge=1_024, le=LARGEST_PAYLOAD - ENVELOPE)] = 16_777_216
    feed_bytes: Annotated[int, msgspec.Meta(ge=65_536)] = 4_194_304
    feeds: Annotated[int, msgspec.Meta(ge=1)] = 20_000
    linger: Positive = 30.0
    heartbeat: Positive = 15.0
    lifetime: Positive = 3_600.0
    stall: Positive = 30.0
    drain: Positive = 10.0
    wait: Positive = 60.0
    compress: bool = False
    consumers: Annotated[int, msgspec.Meta(ge=0)] = 100
    consumer_inactive: Annotated[float, msgspec.Meta(ge=0)] = 604_800.0
    consumer_dead: Annotated[int, msgspec.Meta(ge=1)] = 1_000
    streams: Annotated[int, msgspec.Meta(ge=1)] | None = None
    streams_per_tenant: Annotated[int, msgspec.Meta(ge=1)] | None = None
    streams_per_key: Annotated[int, msgspec.Meta(ge=1)] | None = None
    starts_per_minute_per_tenant: Annotated[int, msgspec.Meta(ge=1)] | None = None
    starts_per_minute_per_key: Annotated[int, msgspec.Meta(ge=1)] | None = None
    running_per_tenant: Annotated[int, msgspec.Meta(ge=1)] | None = None
    running_per_key: Annotated[int, msgspec.Meta(ge=1)] | None = None
    ticket: Annotated[float, msgspec.Meta(ge=1, le=300)] = 60.0
    cors_origins: tuple[str, ...] = ()
    budget_output: Annotated[int, msgspec.Meta(ge=1)] = 4_096
    budget_fallback: Fallback = "refuse"
    console: bool = True
    console_models: tuple[str, ...] = ("scripted/story",)
    billing_url: str | None = None
