"""Percentiles, and the result of a run as data."""

import msgspec

__all__ = ["ClientResult", "Cost", "Latency", "Outcome", "latency", "percentile"]


class Latency(msgspec.Struct):
    """Milliseconds from the provider's write of a token to its arrival at a client."""

    p50: float
    p95: float
    p99: float
    max: float


class Cost(msgspec.Struct):
    """Cost of one process. ``cpu_s``: processor seconds of streaming; ``start_cpu_s``: of opening the streams.

    ``peak_rss_mb``: peak resident memory since its start.
    """

    cpu_s: float
    cpu_ms_per_1000: float
    start_cpu_s: float
    peak_rss_mb: float


class ClientResult(msgspec.Struct):
    """Result of one client process. ``problems``: descriptions of the first few."""

    streams: int
    complete: int
    mismatches: int
    tokens: int
    events: int
    reads: int
    bytes: int
    reconnects: int
    last_ns: int
    problems: list[str] = []


class Outcome(msgspec.Struct, kw_only=True):
    """Result of one measurement of a target. Units as in the names; tokens are the provider's."""

    target: str
    streams: int
    complete: int
    mismatches: int
    events: int
    reads: int
    reconnects: int
    tokens_produced: int
    tokens_delivered: int
    setup_s: float
    streaming_s: float
    settled_s: float | None
    tokens_per_s: float
    provider_late_p50_ms: float
    provider_late_p99_ms: float
    latency_ms: Latency
    processes: dict[str, Cost]
    pipeline_cpu_ms_per_1000: float
    problems: list[str]

    @property
    def good(self) -> bool:
        """Return whether every client received exactly what the provider sent."""
        return self.mismatches == 0 and self.complete == self.streams and not self.problems


def percentile(ordered: list[int], percent: float) -> int:
    """Return the percentile of sorted values (nearest rank), or 0 without values."""
    if not ordered:
        return 0
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, min(len(ordered) - 1, int(rank) - 1))]


def latency(nanoseconds: list[int]) -> Latency:
    """Return the percentiles of latencies in nanoseconds."""
    ordered = sorted(nanoseconds)
    p50, p95, p99, highest = (round(percentile(ordered, p) / 1e6, 3) for p in (50, 95, 99, 100))
    return Latency(p50, p95, p99, highest)
