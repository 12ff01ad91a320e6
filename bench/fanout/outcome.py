"""The result of a run as data."""

import msgspec

from bench.fanout.scenarios import Scenario
from bench.fanout.targets import BrokerLoad
from bench.machine import Machine
from bench.stats import Latency

__all__ = ["FanoutOutcome", "FanoutReport", "ScenarioOutcomes"]


class FanoutOutcome(msgspec.Struct, kw_only=True):
    """Result of one measurement of a target.

    ``round`` names one part of a run with several parts. Units as in the names; ``cpu_us``: processor microseconds of
    each process per delivered event. ``latency_ms``: from the publisher's stamp to a subscriber's read (replays: of a
    whole replay); ``caught_up_ms``: from a returning client's connection until it had all events. Memory per subscriber
    is the growth since before the first subscription.
    """

    target: str
    protocol: str
    round: str = ""
    streams: int
    complete: int
    events: int
    missing: int
    surplus: int
    mismatches: int
    returns: int
    reads: int
    bytes: int
    seconds: float
    events_per_s: float
    late_p99_ms: float
    latency_ms: Latency
    caught_up_ms: Latency
    cpu_us: dict[str, float]
    cpu_s: dict[str, float]
    opening_cpu_s: float
    opening_s: float
    base_rss_mb: float
    idle_rss_kb: float
    idle_pss_kb: float
    live_rss_kb: float
    live_pss_kb: float
    peak_rss_mb: float
    broker: BrokerLoad | None
    counts: dict[str, float]
    problems: list[str]

    @property
    def good(self) -> bool:
        """Return whether every subscriber received every event once, and all checked texts were right."""
        return self.complete == self.streams and not (self.missing or self.surplus or self.mismatches or self.problems)


class ScenarioOutcomes(msgspec.Struct):
    """Outcomes of one scenario; ``not_measured``: why a peer has no outcome."""

    scenario: Scenario
    outcomes: list[FanoutOutcome]
    targets_met: dict[str, bool]
    not_measured: dict[str, str] = {}


class FanoutReport(msgspec.Struct):
    """Results of one command. ``good``: all ran, and no event was lost, duplicated or changed (peers excluded)."""

    at: str
    machine: Machine
    good: bool
    scenarios: list[ScenarioOutcomes]
