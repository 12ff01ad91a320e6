"""Many subscribers in one process: only sockets and epoll, so that the clients cost little compared with the target.

Most connections only count the events that arrive, by a byte that occurs once in each event; a sample reads everything,
compares every text and measures latencies.
"""

import select
import socket
import time
from array import array
from collections.abc import Callable
from typing import Final

import msgspec

from bench.fanout.events import MARK, session, text
from bench.fanout.protocols import PROTOCOLS, MalformedResponse
from bench.fanout.scenarios import Plan

__all__ = ["Checker", "Crowd", "CrowdResult"]

BUFFER: Final = 256 * 1024
PROBLEMS: Final = 10
CONNECT_SECONDS: Final = 10.0


class _Delta(msgspec.Struct):
    type: str
    seq: int
    text: str = ""


_decode = msgspec.json.Decoder(_Delta).decode


class CrowdResult(msgspec.Struct, kw_only=True):
    """Result of one client process. ``missing`` and ``surplus``: events; ``resumed_ms``: one time per reconnection."""

    streams: int
    complete: int
    events: int
    missing: int
    surplus: int
    mismatches: int
    reads: int
    bytes: int
    last_ns: int
    returns: int
    resumed_ms: list[float]
    problems: list[str]


class Checker:
    """One subscriber that checks all events: order, no duplicates, no gaps.

    ``seen``: the number of the next event; ``began``: that of the first expected one. ``took``: the latencies of
    stamped events.
    """

    def __init__(self, plan: Plan, number: int, stamps: memoryview, took: "array[int]") -> None:
        self.number = plan.base + number % plan.sessions
        self.seen = plan.history if plan.live else 0
        self.began = self.seen
        self.surplus = 0
        self.differs = ""
        self.cursor = b""
        self.ended = False
        self.cursors: list[bytes] | None = None  # of all events, if requested
        cells = number % plan.sessions * plan.events
        self._stamps = stamps[cells : cells + plan.events]
        self._events = plan.events
        self._live = plan.live
        self._dialect = PROTOCOLS[plan.protocol]
        self._took = took
        self.stream = self._dialect.stream("", b"", False)

    def call(self) -> bytes:
        """Return the request for a new connection, which continues after the last event."""
        self.stream = self._dialect.stream(session(self.number), self.cursor, self._live)
        return self._dialect.call(session(self.number), self.cursor, self._live)

    def stamped(self, index: int) -> bool:
        """Return whether an event was published after the signal."""
        return bool(self._stamps[index])

    def take(self, data: bytes, now: int) -> int:
        """Add the data of one read; return the number of new events."""
        before = self.seen
        for cursor, event in self.stream.feed(data):
            self.cursor = cursor or self.cursor
            made = _decode(event)
            if made.type == "delta":
                self._judge(made, now)
                if self.cursors is not None:
                    self.cursors.append(cursor)
            else:
                self.ended = self.ended or made.type == "completed"
        return self.seen - before

    def _judge(self, made: _Delta, now: int) -> None:
        index = made.seq - 1
        if index < self.seen:
            self.surplus += 1
            return
        if index != self.seen or made.text != text(self.number, index):
            self.differs = self.differs or f"event {index} {made.text[:20]!r} came instead of event {self.seen}"
        self.seen = index + 1
        if index < self._events and (stamp := self._stamps[index]):
            self._took.append(now - stamp)


class Crowd:
    """The connections of one plan."""

    def __init__(self, plan: Plan, stamps: memoryview) -> None:
        self.plan = plan
        self.took: array[int] = array("q")
        self.problems: list[str] = []
        self.reads = self.bytes = self.last_ns = 0
        self._stamps = stamps
        self._poll = select.epoll()
        self._buffer = bytearray(BUFFER)
        self._sockets: dict[int, socket.socket] = {}
        self._counts: dict[int, int] = {}
        self._checkers: dict[int, Checker] = {}
        self._opening: dict[int, bytes] = {}
        self._left = 0
        self.want = plan.events - plan.history if plan.live else plan.events

    def open(self) -> None:
        """Open all connections, ``at_once`` at a time, until each has received its response head."""
        plan = self.plan
        for number in range(plan.first, plan.stop):
            self._connect(number)
            while len(self._opening) >= plan.at_once:
                self.step(1.0)
        deadline = time.monotonic() + CONNECT_SECONDS
        while self._opening and time.monotonic() < deadline:
            self.step(0.1)
        for _ in self._opening:
            self.problem("no answer's head in time")

    def _connect(self, number: int) -> None:
        plan = self.plan
        connection = connected(plan.port)
        fd = connection.fileno()
        self._sockets[fd] = connection
        self._counts[fd] = 0
        if number % plan.samples == 0 or not PROTOCOLS[plan.protocol].counts:
            self._checkers[fd] = checker = Checker(plan, number, self._stamps, self.took)
            call = checker.call()
        else:
            call = PROTOCOLS[plan.protocol].call(session(plan.base + number % plan.sessions), b"", plan.live)
        self._opening[fd] = b""
        self._left += 1
        connection.sendall(call)
        connection.setblocking(False)
        self._poll.register(fd, select.EPOLLIN)

    def step(self, seconds: float) -> None:
        """Read once from every readable connection; wait at most ``seconds``."""
        buffer, counts, sockets, want = self._buffer, self._counts, self._sockets, self.want
        checkers, opening = self._checkers, self._opening
        for fd, _ in self._poll.poll(seconds):
            try:
                size = sockets[fd].recv_into(buffer)
            except BlockingIOError:
                continue
            except OSError as error:
                self._lost(fd, repr(error))
                continue
            if not size:
                self._lost(fd, "closed by the server")
                continue
            self.reads += 1
            self.bytes += size
            if fd in opening:
                self._head(fd, bytes(buffer[:size]))
                if fd not in sockets:
                    continue
            new = self._check(fd, bytes(buffer[:size])) if fd in checkers else buffer.count(MARK, 0, size)
            if new:
                counts[fd] = count = counts[fd] + new
                if count >= want > count - new:
                    self._left -= 1
                    self.last_ns = time.monotonic_ns()

    def _head(self, fd: int, data: bytes) -> None:
        head = self._opening[fd] + data
        if b"\r\n\r\n" not in head:
            self._opening[fd] = head
            return
        del self._opening[fd]
        if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 101")):
            self._lost(fd, f"answered {head[:200]!r}")

    def _check(self, fd: int, data: bytes) -> int:
        now = time.monotonic_ns()
        checker = self._checkers[fd]
        try:
            new = checker.take(data, now)
            answer(self._sockets[fd], checker)
            return new
        except (OSError, MalformedResponse, msgspec.DecodeError) as error:
            self._lost(fd, f"unreadable: {error}")
            return 0

    def _lost(self, fd: int, why: str) -> None:
        connection = self._sockets.pop(fd, None)
        if connection is None:
            return
        self._poll.unregister(fd)
        connection.detach()
        # The number stays in use, so that no other connection is counted under it.
        self._opening.pop(fd, None)
        if self._counts[fd] < self.want:
            self._left -= 1
            self.problem(f"a connection ended after {self._counts[fd]} events: {why}")

    def run(self, deadline: float, grace: float, finished: Callable[[], bool] = bool) -> None:
        """Read until every connection has all its events, plus ``grace`` seconds, or until the deadline."""
        while self._left and time.monotonic() < deadline:
            self.step(0.2)
        if self._left:
            self.problem(f"{self._left} connections were not complete in time")
        end = time.monotonic() + grace
        while time.monotonic() < end:
            self.step(0.05)

    def problem(self, what: str) -> None:
        """Record a problem; only the first few are kept."""
        if len(self.problems) < PROBLEMS:
            self.problems.append(what)

    def result(self) -> CrowdResult:
        """Return the result so far."""
        want = self.want
        counts = self._counts.values()
        wrong = [c for c in self._checkers.values() if c.differs or c.surplus]
        for checker in wrong:
            self.problem(f"session {checker.number}: {checker.differs or f'{checker.surplus} events twice'}")
        return CrowdResult(
            streams=len(counts),
            complete=sum(count == want for count in counts),
            events=sum(counts),
            missing=sum(max(0, want - count) for count in counts),
            surplus=sum(max(0, count - want) for count in counts) + sum(c.surplus for c in wrong),
            mismatches=sum(1 for c in wrong if c.differs),
            reads=self.reads,
            bytes=self.bytes,
            last_ns=self.last_ns,
            returns=0,
            resumed_ms=[],
            problems=self.problems,
        )


def answer(connection: socket.socket, checker: Checker) -> None:
    """Send the stream's replies, which are short."""
    if checker.stream.replies:
        connection.sendall(checker.stream.replies)
        checker.stream.replies = b""


def connected(port: int, receive: int | None = None) -> socket.socket:
    """Return a connection to a loopback port; ``receive`` is the size of its receive buffer in bytes."""
    connection = socket.socket()
    if receive:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(CONNECT_SECONDS)
    connection.connect(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
