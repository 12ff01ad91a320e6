"""Runs of the open loop: one target under one load, and the highest load that a target carries."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from bench.harness import processes_in
from bench.processes import Processes, Spent, TooLate, fetch, free_port, python
from bench.profiling import Profile
from bench.provider import ControlState
from bench.relay.arrivals import OpenPlan, OpenScenario, schedule
from bench.relay.open_client import OpenResult
from bench.relay.targets import Endpoint, Tailrace, Target
from bench.stamps import Stamps
from bench.stats import Latency, latency
from services.kit.stages import STAGES

__all__ = ["CapacityStep", "OpenOutcome", "OpenRun", "capacity"]

READY_SECONDS: Final = 15.0
LEAD_NS: Final = 200_000_000
SETTLE_SECONDS: Final = 30.0
FIRST_TOKEN_MS: Final = 100.0
GAP_MS: Final = 50.0
"""The capacity is the highest arrival rate with first token p99 and gap p99 within these."""
LOWEST: Final = 2.5
HIGHEST: Final = 320.0
PRECISION: Final = 1.12


class OpenOutcome(msgspec.Struct, kw_only=True):
    """One target measured once.

    ``first_ms``: from the time a start was due to its first token. ``gap_ms``: from the provider's write of a token to
    its arrival. ``very_first_ms``: the first start after all services were ready. ``resume_ms``: from a reconnection to
    the response. CPU is of all processes of the target, from the first start until everything is settled.
    ``stages_ms``: mean of each stage of a start, from the services' own metrics.
    """

    target: str
    starts: int
    complete: int
    cancelled: int
    failed: int
    resumes: int
    mismatches: int
    tokens: int
    seconds: float
    starts_per_s: float
    very_first_ms: float
    first_ms: Latency
    gap_ms: Latency
    resume_ms: Latency
    cpu_ms_per_start: dict[str, float]
    cpu_ms_per_1000: float
    provider_late_p99_ms: float
    problems: list[str]
    stages_ms: dict[str, float] = {}

    @property
    def good(self) -> bool:
        """Whether every answer arrived whole or was cancelled as asked."""
        return self.complete + self.cancelled == self.starts and not (self.failed or self.mismatches or self.problems)


class CapacityStep(msgspec.Struct):
    """One step of the search for a target's capacity."""

    starts: float
    holds: bool
    first_p99_ms: float
    gap_p99_ms: float


class OpenRun:
    """Measures one target under one open-loop scenario. ``seed`` fixes arrivals, lengths, drops and cancels."""

    def __init__(
        self,
        scenario: OpenScenario,
        target: Target,
        *,
        clients: int = 1,
        seed: int = 1,
        profile: Profile | None = None,
        keep: Path | None = None,
    ) -> None:
        self.scenario = scenario
        self.target = target
        self.clients = clients
        self.seed = seed
        self.profile = profile
        self.keep = keep
        self._control = ""

    def measure(self) -> OpenOutcome:
        """Run it and return what was measured; everything started is stopped, whatever happens.

        Raises:
            Died: a process ended although it was needed.
            TooLate: something was not ready or did not end in time.
        """
        with processes_in(self.keep, f"{self.scenario.name}-{self.target.name}") as processes:
            return self._measure(processes)

    def _measure(self, processes: Processes) -> OpenOutcome:
        folder = processes.folder
        starts = schedule(self.scenario, self.seed)
        Stamps.create(folder / "stamps", sum(start.order.tokens for start in starts))
        port = free_port()
        self._control = f"http://127.0.0.1:{port}/control"
        processes.start("provider", python("bench.provider", "--port", str(port), "--stamps", str(folder / "stamps")))
        processes.wait(lambda: fetch(self._control) is not None, READY_SECONDS, "provider ready")
        fetch(self._control, method="POST")
        longest = max((start.at + start.order.tokens / self.scenario.rate for start in starts), default=0.0)
        deadline = 30.0 + 3 * min(longest, self.scenario.seconds + 60.0)
        plans: list[OpenPlan] = []
        # The clients start first, so that nothing but the target's own readiness comes before the first start.
        endpoint = self.target.start(processes, port)
        for number in range(self.clients):
            plans.append(self._plan(endpoint, folder, number, deadline))
            path = folder / f"client-{number}.plan"
            mine = [start for start in starts if start.order.stream % self.clients == number]
            path.write_bytes(msgspec.json.encode(msgspec.structs.replace(plans[-1], starts=mine)))
            processes.start(f"client-{number}", python("bench.relay.open_client", str(path)))
        processes.wait(lambda: all(Path(p.ready).exists() for p in plans), READY_SECONDS, "clients ready")
        before = processes.spent()
        if self.profile:
            self.profile.start(processes.all)
        go = folder / "go.part"
        go.write_text(str(time.monotonic_ns() + LEAD_NS))
        go.rename(folder / "go")
        processes.wait(lambda: all(Path(p.result).exists() for p in plans), deadline + 30.0, "answers ended", poll=0.1)
        self._wait_settled(processes)
        if self.profile:
            self.profile.stop()
        return self._outcome(plans, before, processes.spent())

    def _plan(self, endpoint: Endpoint, folder: Path, number: int, deadline: float) -> OpenPlan:
        return OpenPlan(
            kind=endpoint.kind,
            host="127.0.0.1",
            port=endpoint.port,
            model=endpoint.model,
            headers=endpoint.headers,
            run=f"bench-{os.getpid()}",
            starts=[],
            resumes=endpoint.kind == "tailrace",
            workers=self.scenario.workers // self.clients,
            seconds=self.scenario.seconds,
            deadline=deadline,
            stamps=str(folder / "stamps"),
            ready=str(folder / f"client-{number}.ready"),
            go=str(folder / "go"),
            result=str(folder / f"client-{number}.json"),
        )

    def _wait_settled(self, processes: Processes) -> None:
        if self.target.settled() is not None:
            processes.wait(lambda: bool(self.target.settled()), SETTLE_SECONDS, "settled", poll=0.1)

    def _outcome(self, plans: list[OpenPlan], before: dict[str, Spent], after: dict[str, Spent]) -> OpenOutcome:
        results = [msgspec.json.decode(Path(plan.result).read_bytes(), type=OpenResult) for plan in plans]
        answer = fetch(self._control)
        state = msgspec.json.decode(answer, type=ControlState) if answer else ControlState(0, 0, 0.0, 0.0)
        started = sum(r.starts for r in results)
        tokens = sum(r.tokens for r in results)
        spent = {
            name: after[name].cpu - before.get(name, Spent(0.0, 0)).cpu for name in self.target.parts if name in after
        }
        seconds = max(0.001, (max(r.ended_ns for r in results) - min(r.opened_ns for r in results)) / 1e9)
        first = [value for r in results for value in r.first]
        return OpenOutcome(
            target=self.target.name,
            starts=started,
            complete=sum(r.complete for r in results),
            cancelled=sum(r.cancelled for r in results),
            failed=sum(r.failed for r in results),
            resumes=sum(r.resumes for r in results),
            mismatches=sum(r.mismatches for r in results),
            tokens=tokens,
            seconds=round(seconds, 2),
            starts_per_s=round(started / seconds, 1),
            very_first_ms=round(results[0].first[0] / 1e6, 2) if results[0].first else 0.0,
            first_ms=latency(first),
            gap_ms=latency([value for r in results for value in r.gaps]),
            resume_ms=latency([value for r in results for value in r.resumed]),
            cpu_ms_per_start={name: round(1e3 * cpu / max(1, started), 2) for name, cpu in spent.items()},
            cpu_ms_per_1000=round(1e6 * sum(spent.values()) / max(1, tokens), 1),
            provider_late_p99_ms=state.late_p99_ms,
            problems=[problem for r in results for problem in r.problems],
            stages_ms=self._stages(),
        )

    def _stages(self) -> dict[str, float]:
        """Return the mean of each stage of a start in milliseconds, in the order of the stages."""
        if not isinstance(self.target, Tailrace):
            return {}
        found = self.target.stages()
        return {name: round(1e3 * found[name][0] / found[name][1], 2) for name in STAGES if name in found}


def capacity(
    scenario: OpenScenario, measure: Callable[[OpenScenario], OpenOutcome], report: Callable[[CapacityStep], None]
) -> float:
    """Return the highest arrival rate at which first token and gap stay within their p99, found by bisection.

    ``measure`` runs one load; ``report`` is called after each. The result is within `PRECISION` of the limit, and 0 if
    not even `LOWEST` holds.
    """
    holds, fails = 0.0, 0.0
    rate = scenario.starts or 20.0
    while (not fails or not holds or fails / holds > PRECISION) and LOWEST <= rate <= HIGHEST:
        try:
            outcome = measure(msgspec.structs.replace(scenario, name=f"capacity-{rate:g}", starts=rate))
            step = CapacityStep(
                rate,
                not outcome.failed and outcome.first_ms.p99 <= FIRST_TOKEN_MS and outcome.gap_ms.p99 <= GAP_MS,
                outcome.first_ms.p99,
                outcome.gap_ms.p99,
            )
        except TooLate:
            step = CapacityStep(rate, False, 0.0, 0.0)
        report(step)
        if step.holds:
            holds = rate
            rate = (holds * fails) ** 0.5 if fails else holds * 2
        else:
            fails = rate
            rate = (holds * fails) ** 0.5 if holds else fails / 2
        rate = round(rate, 1)
    return holds
