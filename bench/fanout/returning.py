"""Returning clients: a storm of reconnections, each with its own cursor, and cold replays of finished answers."""

import heapq
import random
import select
import socket
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from bench.fanout.crowd import PROBLEMS, Checker, CrowdResult, answer, connected
from bench.fanout.protocols import MalformedResponse
from bench.fanout.scenarios import Plan

__all__ = ["Returning", "replay", "storm"]

READ: Final = 256 * 1024
LEAD: Final = 2.0
"""Seconds of live events before a storm begins."""


class Visit:
    """A connection of a checker. ``goal``: number of events with which it has caught up with its time of connecting."""

    __slots__ = ("began", "checker", "goal", "socket")

    def __init__(self, checker: Checker, connection: socket.socket, goal: int) -> None:
        self.checker = checker
        self.socket = connection
        self.began = time.monotonic_ns()
        self.goal: int | None = goal


class Returning:
    """Connections that are opened and closed one by one; all of them check all events."""

    def __init__(self, plan: Plan, stamps: memoryview) -> None:
        self.plan = plan
        self.took: array[int] = array("q")
        self.checkers = [Checker(plan, number, stamps, self.took) for number in range(plan.first, plan.stop)]
        self.problems: list[str] = []
        self.resumed_ms: list[float] = []
        self.returns = self.reads = self.bytes = self.last_ns = 0
        self._cells = stamps
        self._poll = select.epoll()
        self._visits: dict[int, Visit] = {}
        self._of: dict[Checker, int] = {}

    @property
    def open(self) -> int:
        """Return the number of open connections."""
        return len(self._visits)

    def visit(self, checker: Checker) -> None:
        """Connect and continue after the last event."""
        connection = connected(self.plan.port)
        goal = checker.seen
        while goal < self.plan.events and checker.stamped(goal):
            goal += 1
        self._visits[connection.fileno()] = Visit(checker, connection, max(goal, self.plan.history))
        self._of[checker] = connection.fileno()
        connection.sendall(checker.call())
        connection.setblocking(False)
        self._poll.register(connection, select.EPOLLIN)

    def scout(self, number: int) -> Checker:
        """Connect an additional checker that keeps every cursor of a session."""
        scout = Checker(self.plan, number - self.plan.base, self._cells, array("q"))
        scout.cursors = []
        self.visit(scout)
        return scout

    def leave(self, checker: Checker) -> None:
        """Drop a checker's connection, if it has one."""
        visit = self._visits.pop(self._of.pop(checker, -1), None)
        if visit is not None:
            self._poll.unregister(visit.socket)
            visit.socket.close()

    def step(self, seconds: float) -> Iterator[Checker]:
        """Read once from every readable connection; yield the checkers with new events."""
        for fd, _ in self._poll.poll(seconds):
            visit = self._visits.get(fd)
            if visit is None:
                continue
            checker = visit.checker
            try:
                data = visit.socket.recv(READ)
                if data:
                    self._take(visit, data)
                else:
                    self._lost(checker, "closed by the server")
            except BlockingIOError:
                continue
            except (OSError, MalformedResponse, msgspec.DecodeError) as error:
                self._lost(checker, repr(error))
            if checker.stream.status not in (None, 200):
                self._lost(checker, f"answered {checker.stream.status}")
            yield checker

    def _take(self, visit: Visit, data: bytes) -> None:
        checker, now = visit.checker, time.monotonic_ns()
        self.reads += 1
        self.bytes += len(data)
        if checker.take(data, now):
            self.last_ns = now
        answer(visit.socket, checker)
        if visit.goal is not None and checker.seen >= visit.goal and checker.stream.status is not None:
            self.resumed_ms.append((now - visit.began) / 1e6)
            visit.goal = None

    def _lost(self, checker: Checker, why: str) -> None:
        if checker.seen < self.plan.events and checker in self._of:
            self.problem(f"a connection ended after {checker.seen} events: {why}")
        self.leave(checker)

    def problem(self, what: str) -> None:
        """Record a problem; only the first few are kept."""
        if len(self.problems) < PROBLEMS:
            self.problems.append(what)

    def result(self) -> CrowdResult:
        """Return the result so far."""
        want = self.plan.events
        for checker in self.checkers:
            if checker.differs or checker.surplus or checker.seen != want:
                what = checker.differs or f"{checker.surplus} events twice, {want - checker.seen} missing"
                self.problem(f"session {checker.number}: {what}")
        return CrowdResult(
            streams=len(self.checkers),
            complete=sum(c.seen == want and not c.differs and not c.surplus for c in self.checkers),
            events=sum(c.seen - c.began + c.surplus for c in self.checkers),
            missing=sum(max(0, want - c.seen) for c in self.checkers),
            surplus=sum(c.surplus for c in self.checkers),
            mismatches=sum(1 for c in self.checkers if c.differs),
            reads=self.reads,
            bytes=self.bytes,
            last_ns=self.last_ns,
            returns=self.returns,
            resumed_ms=[round(taken, 2) for taken in self.resumed_ms],
            problems=self.problems,
        )


def storm(clients: Returning, deadline: float, ready: Callable[[], None], draw: random.Random) -> None:
    """Let all clients read, disconnect, and return within the plan's time; read on until each has all events."""
    plan = clients.plan
    if plan.history:
        _scatter(clients, draw)
    else:
        for checker in clients.checkers:
            clients.visit(checker)
            for _ in clients.step(0.0):
                pass
    clients.resumed_ms.clear()
    ready()
    _wait_for(Path(plan.go), clients, deadline)
    due = _moves(clients, time.monotonic(), draw)
    wanting = {c for c in clients.checkers if c.seen < plan.events}
    while (wanting or due) and time.monotonic() < deadline:
        while due and due[0][0] <= time.monotonic():
            _, number, returns = heapq.heappop(due)
            checker = clients.checkers[number]
            if returns:
                clients.visit(checker)
                clients.returns += 1
            else:
                clients.leave(checker)
        for checker in clients.step(max(0.0, min(0.1, due[0][0] - time.monotonic())) if due else 0.1):
            if checker.seen >= plan.events:
                wanting.discard(checker)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        _read(clients)


def _moves(clients: Returning, begin: float, draw: random.Random) -> list[tuple[float, int, bool]]:
    """Return the times at which clients disconnect (False) and return (True); with a history all start disconnected."""
    within, moves = clients.plan.within, []
    for number in range(len(clients.checkers)):
        leaves = 0.0 if clients.plan.history else LEAD + draw.uniform(0, within / 2)
        if leaves:
            moves.append((begin + leaves, number, False))
        moves.append((begin + max(leaves, draw.uniform(0, within) + (LEAD if leaves else 0.0)), number, True))
    heapq.heapify(moves)
    return moves


def _scatter(clients: Returning, draw: random.Random) -> None:
    """Read the history once, and assign each client a different position in it to continue from."""
    plan = clients.plan
    places: dict[int, list[bytes]] = {}
    for number in range(plan.base, plan.base + plan.sessions):
        scout = clients.scout(number)
        while scout.seen < plan.history and clients.open:
            for _ in clients.step(0.2):
                pass
        clients.leave(scout)
        places[number] = scout.cursors or []
    for checker in clients.checkers:
        checker.seen = checker.began = draw.randint(1, plan.history)
        checker.cursor = places[checker.number][checker.seen - 1]


def replay(clients: Returning, deadline: float, ready: Callable[[], None]) -> None:
    """Read every answer from beginning to end, ``at_once`` at a time; the times are of whole replays."""
    plan = clients.plan
    ready()
    _wait_for(Path(plan.go), clients, deadline)
    waiting = list(reversed(clients.checkers))
    began: dict[Checker, int] = {}
    while (waiting or clients.open) and time.monotonic() < deadline:
        while waiting and clients.open < plan.at_once:
            checker = waiting.pop()
            began[checker] = time.monotonic_ns()
            clients.visit(checker)
        for checker in clients.step(0.2):
            if checker.ended and checker.seen >= plan.events:
                clients.took.append(time.monotonic_ns() - began[checker])
                clients.leave(checker)
    clients.resumed_ms.clear()


def _wait_for(go: Path, clients: Returning, deadline: float) -> None:
    while not go.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("no signal to begin")
        _read(clients)


def _read(clients: Returning) -> None:
    for _ in clients.step(0.01):
        pass
