"""One run: start all processes, open all streams, start them together, and measure until the last client finishes."""

import os
import time
from array import array
from pathlib import Path
from typing import Final

import msgspec

from bench.harness import processes_in
from bench.processes import Processes, Spent, TooLate, fetch, free_port, python
from bench.profiling import Profile
from bench.provider import ControlState
from bench.relay.scenarios import Plan, Scenario
from bench.relay.targets import Endpoint, Target
from bench.stamps import Stamps
from bench.stats import ClientResult, Cost, Outcome, latency

__all__ = ["Run"]

SETUP_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 30.0
READY_SECONDS: Final = 15.0
QUIET: Final = 0.5  # lets the after-effects of opening the streams end, so that only streaming is measured


class _Marks(msgspec.Struct, frozen=True):
    """Resources used before the streams were opened, when all were open, and at the end. Times in seconds."""

    setup: float
    settled: float | None
    before: dict[str, Spent]
    opened: dict[str, Spent]
    ended: dict[str, Spent]


class Run:
    """Measure one target under one scenario. ``clients``: number of client processes that share the streams.

    ``patience`` multiplies the time limit. ``profile``: name of a process to profile while it streams. ``keep``: folder
    in which to keep logs and data instead of removing them.
    """

    def __init__(
        self,
        scenario: Scenario,
        target: Target,
        *,
        clients: int = 1,
        patience: float = 1.0,
        profile: Profile | None = None,
        keep: Path | None = None,
    ) -> None:
        self.scenario = scenario
        self.target = target
        self.clients = min(clients, scenario.generations)
        self.seconds = scenario.seconds * patience
        self.profile = profile
        self.keep = keep

    def measure(self) -> Outcome:
        """Run it and return the outcome; stop all started processes in any case.

        Raises:
            Died: a required process ended.
            TooLate: the streams were not open in time.
        """
        with processes_in(self.keep, f"{self.scenario.name}-{self.target.name}") as processes:
            return self._measure(processes)

    def _measure(self, processes: Processes) -> Outcome:
        folder, scenario = processes.folder, self.scenario
        Stamps.create(folder / "stamps", scenario.produced)
        port = free_port()
        self._control = f"http://127.0.0.1:{port}/control"
        processes.start("provider", python("bench.provider", "--port", str(port), "--stamps", str(folder / "stamps")))
        processes.wait(lambda: fetch(self._control) is not None, READY_SECONDS, "provider ready")
        endpoint = self.target.start(processes, port)
        before = processes.spent()
        began = time.monotonic()
        plans = self._start_clients(processes, endpoint)
        self._wait_open(processes, plans)
        setup = time.monotonic() - began
        self._wait_settled(processes)
        time.sleep(QUIET)
        opened = processes.spent()
        if self.profile:
            self.profile.start(processes.all)
        fetch(self._control, method="POST")
        self._wait_ended(processes, plans)
        state = self._state()
        settled = self._wait_settled(processes)
        ended = processes.spent()
        if self.profile:
            self.profile.stop()
        self._wait_results(processes, plans)
        marks = _Marks(round(setup, 3), None if settled is None else round(settled, 3), before, opened, ended)
        return self._outcome(folder, plans, marks, state)

    def _start_clients(self, processes: Processes, endpoint: Endpoint) -> list[Plan]:
        scenario, folder = self.scenario, processes.folder
        share, more = divmod(scenario.generations, self.clients)
        plans, first = [], 0
        for number in range(self.clients):
            count = share + (number < more)
            plan = Plan(
                kind=endpoint.kind,
                host="127.0.0.1",
                port=endpoint.port,
                model=endpoint.model,
                headers=endpoint.headers,
                run=f"bench-{os.getpid()}",
                first=first,
                generations=count,
                total=scenario.generations,
                tokens=scenario.tokens,
                rate=scenario.rate,
                subscribers=scenario.subscribers if endpoint.kind == "tailrace" else 1,
                deadline=SETUP_SECONDS + self.seconds,
                stamps=str(folder / "stamps"),
                latencies=str(folder / f"client-{number}.latencies"),
                ready=str(folder / f"client-{number}.ready"),
                ended=str(folder / f"client-{number}.ended"),
                result=str(folder / f"client-{number}.json"),
            )
            path = folder / f"client-{number}.plan"
            path.write_bytes(msgspec.json.encode(plan))
            module = "bench.relay.log_client" if endpoint.kind == "log" else "bench.relay.client"
            processes.start(f"client-{number}", python(module, str(path)))
            plans.append(plan)
            first += count
        return plans

    def _state(self) -> ControlState:
        answer = fetch(self._control)
        if answer is None:
            raise TooLate("the provider does not answer")
        return msgspec.json.decode(answer, type=ControlState)

    def _wait_open(self, processes: Processes, plans: list[Plan]) -> None:
        def opened() -> bool:
            if any(Path(plan.result).exists() for plan in plans):
                raise TooLate(f"a client gave up while streams were opened: {self._problems(plans)}")
            return all(Path(p.ready).exists() for p in plans) and self._state().waiting == self.scenario.generations

        try:
            processes.wait(opened, SETUP_SECONDS, "all streams open", poll=0.1)
        except TooLate as error:
            waiting = self._state().waiting
            raise TooLate(f"{error} ({waiting} of {self.scenario.generations} streams reached the provider)") from error

    def _wait_ended(self, processes: Processes, plans: list[Plan]) -> None:
        def ended() -> bool:
            return all(Path(plan.ended).exists() or Path(plan.result).exists() for plan in plans)

        processes.wait(ended, SETUP_SECONDS + self.seconds + 10.0, "streams ended", poll=0.1)

    def _wait_results(self, processes: Processes, plans: list[Plan]) -> None:
        def finished() -> bool:
            return all(Path(plan.result).exists() for plan in plans)

        processes.wait(finished, SETUP_SECONDS + self.seconds + 10.0, "clients finished", poll=0.1)

    def _wait_settled(self, processes: Processes) -> float | None:
        began = time.monotonic()
        if self.target.settled() is None:
            return None
        try:
            processes.wait(lambda: bool(self.target.settled()), SETTLE_SECONDS, "settled", poll=0.1)
        except TooLate:
            return SETTLE_SECONDS
        return time.monotonic() - began

    @staticmethod
    def _problems(plans: list[Plan]) -> str:
        results = [
            msgspec.json.decode(Path(p.result).read_bytes(), type=ClientResult)
            for p in plans
            if Path(p.result).exists()
        ]
        return "; ".join(problem for result in results for problem in result.problems)

    def _outcome(self, folder: Path, plans: list[Plan], marks: _Marks, state: ControlState) -> Outcome:
        results = [msgspec.json.decode(Path(p.result).read_bytes(), type=ClientResult) for p in plans]
        latencies: array[int] = array("q")
        for plan in plans:
            latencies.frombytes(Path(plan.latencies).read_bytes())
        first = Stamps(folder / "stamps").first()
        streaming = max(0.0, max(r.last_ns for r in results) - first) / 1e9
        delivered = sum(r.tokens for r in results)
        costs = {name: self._cost(name, marks) for name in marks.ended}
        pipeline = sum(costs[name].cpu_ms_per_1000 for name in self.target.parts)
        return Outcome(
            target=self.target.name,
            streams=sum(r.streams for r in results),
            complete=sum(r.complete for r in results),
            mismatches=sum(r.mismatches for r in results),
            events=sum(r.events for r in results),
            reads=sum(r.reads for r in results),
            reconnects=sum(r.reconnects for r in results),
            tokens_produced=self.scenario.produced,
            tokens_delivered=delivered,
            setup_s=marks.setup,
            streaming_s=round(streaming, 3),
            settled_s=marks.settled,
            tokens_per_s=round(delivered / streaming, 1) if streaming else 0.0,
            provider_late_p50_ms=state.late_p50_ms,
            provider_late_p99_ms=state.late_p99_ms,
            latency_ms=latency(latencies.tolist()),
            processes=costs,
            pipeline_cpu_ms_per_1000=round(pipeline, 2),
            problems=[problem for r in results for problem in r.problems],
        )

    def _cost(self, name: str, marks: _Marks) -> Cost:
        before, opened, ended = (when.get(name, Spent(0.0, 0)) for when in (marks.before, marks.opened, marks.ended))
        cpu = max(0.0, ended.cpu - opened.cpu)
        return Cost(
            cpu_s=round(cpu, 3),
            cpu_ms_per_1000=round(cpu * 1e6 / self.scenario.produced, 2),
            start_cpu_s=round(opened.cpu - before.cpu, 3),
            peak_rss_mb=round(ended.peak / 1e6, 1),
        )
