"""One run: start the target, connect the clients, publish, and wait until all clients have all events."""

import time
from array import array
from pathlib import Path
from typing import Final

import msgspec

from bench.fanout.crowd import CrowdResult
from bench.fanout.memory import Memory, memory_of
from bench.fanout.outcome import FanoutOutcome
from bench.fanout.publisher import Published
from bench.fanout.scenarios import Kind, Order, Plan, Scenario
from bench.fanout.targets import BrokerLoad, Place, Target
from bench.harness import processes_in
from bench.processes import Process, Processes, Spent, python
from bench.profiling import Profile
from bench.stamps import Stamps
from bench.stats import latency

__all__ = ["Run"]

OPEN_SECONDS: Final = 120.0
SAMPLED: Final = 200
SAMPLED_EVENTS: Final = 100_000
"""Bound of the subscribers, and of subscribers times events, that clients read in full."""
AT_ONCE: Final = 64
REPLAYS_AT_ONCE: Final = 100
QUIET: Final = 1.5
"""Seconds between the last connection and the first event, and before memory is read, for background work to end."""


class _Marks(msgspec.Struct, frozen=True):
    """Resources used at three times: before the first connection, when all were connected, and at the end."""

    opening: float
    spent: tuple[dict[str, Spent], dict[str, Spent], dict[str, Spent]]
    memory: tuple[Memory, Memory, Memory]
    load: tuple[BrokerLoad | None, BrokerLoad | None]
    counts: tuple[dict[str, float], dict[str, float]]


class _Round(msgspec.Struct, frozen=True):
    """A part of a run. ``number`` separates its sessions and files. ``stuck``: number of clients that read nothing."""

    number: int
    name: str
    stuck: int


class Run:
    """Measure one target under one scenario with ``clients`` client processes.

    ``profile``: name of a process to profile from the first event on. ``keep``: folder in which to keep logs and data.
    """

    def __init__(
        self,
        scenario: Scenario,
        target: Target,
        protocol: str,
        *,
        clients: int = 2,
        profile: Profile | None = None,
        keep: Path | None = None,
    ) -> None:
        self.scenario = scenario
        self.target = target
        self.protocol = protocol
        self.clients = min(clients, scenario.streams)
        self.profile = profile
        self.keep = keep

    def measure(self) -> list[FanoutOutcome]:
        """Run it and return the outcomes by round; stop all started processes in any case.

        Raises:
            Died: a required process ended.
            TooLate: a step did not finish in time.
        """
        with processes_in(self.keep, f"{self.scenario.name}-{self.target.name}-{self.protocol}") as processes:
            place = self.target.start(processes, self.scenario)
            return [self._round(processes, place, part) for part in self._rounds()]

    def _rounds(self) -> list[_Round]:
        if not self.scenario.stuck:
            return [_Round(0, "", 0)]
        stuck = self.scenario.stuck
        return [
            _Round(number, f"beside {stuck} stuck" if number % 2 else "alone", stuck if number % 2 else 0)
            for number in range(4)
        ]

    def _round(self, processes: Processes, place: Place, part: _Round) -> FanoutOutcome:
        scenario = self.scenario
        folder = processes.folder / f"round-{part.number}"
        folder.mkdir()
        Stamps.create(folder / "stamps", scenario.sessions * scenario.events)
        watched = processes.all[self.target.part]
        order = self._order(folder, place, part)
        publisher = _launch(processes, "publisher", "bench.fanout.publisher", order)
        processes.wait(Path(order.ready).exists, self.scenario.seconds, "history written")
        stuck = self._stick(processes, folder, place, part)
        before, memory, counts, load = processes.spent(), memory_of(watched.pid), self.target.counts(), None
        began = time.monotonic()
        plans = self._plans(folder, place, part)
        clients = [_launch(processes, f"client-{n}", "bench.fanout.client", plan) for n, plan in enumerate(plans)]
        processes.wait(lambda: all(Path(p.ready).exists() for p in plans), OPEN_SECONDS, "all connected", poll=0.05)
        opening = time.monotonic() - began
        time.sleep(QUIET)
        opened, idle, load = processes.spent(), memory_of(watched.pid), self.target.load()
        if self.profile:
            self.profile.start(processes.all)
        Path(order.go).touch()
        results = [Path(plan.result) for plan in plans]
        processes.wait(lambda: all(r.exists() for r in results), scenario.seconds + 20, "clients finished", poll=0.1)
        ended = processes.spent()
        if self.profile:
            self.profile.stop()
        processes.wait(Path(order.result).exists, 20, "publisher finished")
        marks = _Marks(
            opening=opening,
            spent=(before, opened, ended),
            memory=(memory, idle, memory_of(watched.pid)),
            load=(load, self.target.load()),
            counts=(counts, self.target.counts()),
        )
        for process in (*clients, publisher, *stuck):
            process.stop()
            del processes.all[process.name]
        return self._outcome(part, order, plans, marks)

    def _order(self, folder: Path, place: Place, part: _Round) -> Order:
        scenario = self.scenario
        return Order(
            kind=place.kind,
            port=place.publish_port,
            base=part.number * scenario.sessions,
            sessions=scenario.sessions,
            history=scenario.history,
            events=scenario.events,
            rate=scenario.rate,
            ends=scenario.kind == "replay",
            deadline=scenario.seconds + OPEN_SECONDS,
            stamps=str(folder / "stamps"),
            go=str(folder / "go"),
            ready=str(folder / "publisher.ready"),
            result=str(folder / "publisher.json"),
        )

    def _plans(self, folder: Path, place: Place, part: _Round) -> list[Plan]:
        streams = self.scenario.streams
        bounds = [streams * n // self.clients for n in range(self.clients + 1)]
        return [self._plan(folder, place, part, f"client-{n}", (bounds[n], bounds[n + 1])) for n in range(self.clients)]

    def _plan(
        self, folder: Path, place: Place, part: _Round, name: str, share: tuple[int, int], kind: Kind | None = None
    ) -> Plan:
        scenario = self.scenario
        kind = kind or ("live" if scenario.kind == "stuck" else scenario.kind)
        return Plan(
            kind=kind,
            protocol=place.protocols[self.protocol],
            port=place.ports[self.protocol],
            first=share[0],
            stop=share[1],
            base=part.number * scenario.sessions,
            sessions=scenario.sessions,
            events=scenario.events,
            history=scenario.history,
            live=scenario.kind == "stuck" and kind == "live",
            samples=max(1, scenario.streams // min(SAMPLED, max(10, SAMPLED_EVENTS // scenario.events))),
            within=scenario.within,
            at_once=max(1, (REPLAYS_AT_ONCE if kind == "replay" else AT_ONCE) // self.clients),
            deadline=scenario.seconds + OPEN_SECONDS,
            stamps=str(folder / "stamps"),
            latencies=str(folder / f"{name}.latencies"),
            go=str(folder / "go"),
            ready=str(folder / f"{name}.ready"),
            result=str(folder / f"{name}.json"),
        )

    def _stick(self, processes: Processes, folder: Path, place: Place, part: _Round) -> list[Process]:
        if not part.stuck:
            return []
        plan = self._plan(folder, place, part, "stuck", (0, part.stuck), "stuck")
        process = _launch(processes, "stuck", "bench.fanout.client", plan)
        processes.wait(Path(plan.ready).exists, OPEN_SECONDS, "stuck clients connected")
        return [process]

    def _outcome(self, part: _Round, order: Order, plans: list[Plan], marks: _Marks) -> FanoutOutcome:
        results = [msgspec.json.decode(Path(p.result).read_bytes(), type=CrowdResult) for p in plans]
        published = msgspec.json.decode(Path(order.result).read_bytes(), type=Published)
        took: array[int] = array("q")
        for plan in plans:
            took.frombytes(Path(plan.latencies).read_bytes())
        events = sum(r.events for r in results)
        seconds = self._seconds(order, results, marks)
        before, opened, ended = marks.spent
        cpu = {name: ended[name].cpu - opened[name].cpu for name in ended if name in opened}
        base, idle, live = marks.memory
        streams = sum(r.streams for r in results)
        resumed = [int(ms * 1e6) for r in results for ms in r.resumed_ms]
        problems = [problem for r in results for problem in r.problems]
        if published.refused:
            problems.append(f"{published.refused} publishes were refused")
        return FanoutOutcome(
            target=self.target.name,
            protocol=self.protocol,
            round=part.name,
            streams=streams,
            complete=sum(r.complete for r in results),
            events=events,
            missing=sum(r.missing for r in results),
            surplus=sum(r.surplus for r in results),
            mismatches=sum(r.mismatches for r in results),
            returns=sum(r.returns for r in results),
            reads=sum(r.reads for r in results),
            bytes=sum(r.bytes for r in results),
            seconds=round(seconds, 3),
            events_per_s=round(events / seconds, 1) if seconds else 0.0,
            late_p99_ms=published.late_p99_ms,
            latency_ms=latency(took.tolist()),
            caught_up_ms=latency(resumed),
            cpu_us={name: round(spent * 1e6 / max(events, 1), 3) for name, spent in cpu.items()},
            cpu_s={name: round(spent, 3) for name, spent in cpu.items()},
            opening_cpu_s=round(opened[self.target.part].cpu - before[self.target.part].cpu, 3),
            opening_s=round(marks.opening, 3),
            base_rss_mb=round(base.rss / 1e6, 1),
            idle_rss_kb=_each(idle.rss - base.rss, streams),
            idle_pss_kb=_each(idle.pss - base.pss, streams),
            live_rss_kb=_each(live.rss - base.rss, streams),
            live_pss_kb=_each(live.pss - base.pss, streams),
            peak_rss_mb=round(ended[self.target.part].peak / 1e6, 1),
            broker=_difference(*marks.load),
            counts={
                k: v - marks.counts[0].get(k, 0) for k, v in marks.counts[1].items() if v != marks.counts[0].get(k)
            },
            problems=problems,
        )

    def _seconds(self, order: Order, results: list[CrowdResult], marks: _Marks) -> float:
        """Return the time from the first stamp (replays: from the signal) to the last event of the last client."""
        first = Stamps(Path(order.stamps)).first() or int(Path(order.go).stat().st_mtime_ns + _clock_offset())
        return max(0.0, max(r.last_ns for r in results) - first) / 1e9


def _clock_offset() -> int:
    return time.monotonic_ns() - time.time_ns()


def _launch(processes: Processes, name: str, module: str, task: Order | Plan) -> Process:
    path = Path(task.result).with_suffix(".task")
    path.write_bytes(msgspec.json.encode(task))
    return processes.start(name, python(module, str(path)))


def _each(bytes_: int, streams: int) -> float:
    return round(bytes_ / 1024 / max(streams, 1), 2)


def _difference(before: BrokerLoad | None, after: BrokerLoad | None) -> BrokerLoad | None:
    if before is None or after is None:
        return None
    return BrokerLoad(after.requests - before.requests, after.messages - before.messages, after.bytes - before.bytes)
