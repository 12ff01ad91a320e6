"""The result of a run as data."""

import msgspec

from bench.fanout.scenarios import Scenario
from bench.fanout.targets import BrokerLoad
from bench.machine import Machine
from bench.stats import Latency

__all__ = ["FanoutOutcome", "FanoutReport", "ScenarioOutcomes"]


class FanoutOutcome(msgspec.Struct, kw_only=True):
    """One target measured once.

    ``round`` names the part of a run that has several. Times in the units that the names give; ``cpu_us`` is processor
    time in microseconds of each process, divided by the events that were delivered. ``latency_ms`` is from the
    publisher's stamp to a subscriber's read (replays: the whole of one); ``caught_up_ms`` from a returning client's
    connecting until it had everything. Memory per subscriber is the growth from before anybody had subscribed.
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
        """Whether every subscriber got every event once, and those that were read had the right text."""
        return self.complete == self.streams and not (self.missing or self.surplus or self.mismatches or self.problems)


class ScenarioOutcomes(msgspec.Struct):
    """One scenario; ``not_measured`` says of a peer why it has no outcome."""

    scenario: Scenario
    outcomes: list[FanoutOutcome]
    targets_met: dict[str, bool]
    not_measured: dict[str, str] = {}


class FanoutReport(msgspec.Struct):
    """What one command measured. ``good``: all was run, and nothing was lost, doubled or changed (peers aside)."""

    at: str
    machine: Machine
    good: bool
    scenarios: list[ScenarioOutcomes]
