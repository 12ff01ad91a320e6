"""A model of a log and of the writers that append to it, to test the acceptance rule against.

The network is unkind: a publish may be lost, arrive twice, or arrive late; an acknowledgement may be lost or late; a
writer may fall asleep at any point, lose its lease to another one, and continue unchanged.
"""

from dataclasses import dataclass, field

from schemas.acceptance import BEGINNING, Position, Verdict, judge

TERMINAL = "completed"


@dataclass(frozen=True)
class Entry:
    """One stored event. ``writer`` and ``content`` are its writer's intent; the rule does not use them."""

    type: str
    epoch: int
    seq: int
    writer: int
    content: str = ""


def accepted(log: list[Entry]) -> list[Entry]:
    """Return the entries that a reader accepts."""
    position, out = BEGINNING, []
    for entry in log:
        position, verdict = judge(position, entry.type, entry.epoch, entry.seq)
        if verdict is Verdict.ACCEPTED:
            out.append(entry)
    return out


def position_of(log: list[Entry]) -> Position:
    position = BEGINNING
    for entry in log:
        position, _ = judge(position, entry.type, entry.epoch, entry.seq)
    return position


@dataclass
class Log:
    """A subject of the log."""

    entries: list[Entry] = field(default_factory=list)

    def append(self, entry: Entry) -> int:
        self.entries.append(entry)
        return len(self.entries)

    def append_if(self, entry: Entry, last: int) -> int | None:
        """Append only if the log has ``last`` entries; the broker's expected-last-subject-sequence."""
        return self.append(entry) if len(self.entries) == last else None


@dataclass
class Copy:
    """One publish under way."""

    index: int
    entry: Entry


@dataclass
class Writer:
    """A producer with a window of unacknowledged events and go-back-N.

    ``script``: the events after its first one. ``opened`` once its conditional first append is stored.
    """

    name: int
    script: list[str]
    read: int = 0
    epoch: int = 0
    first_seq: int = 0
    events: list[Entry] = field(default_factory=list)
    opened: bool = False
    refused: bool = False
    base: int = 1
    sent: int = 1
    last_counted: int = 0
    acknowledged: dict[int, int] = field(default_factory=dict)
    connections: list[list[Copy]] = field(default_factory=lambda: [[]])
    pending: list[tuple[int, int]] = field(default_factory=list)

    def look(self, log: Log, *, restart: bool) -> None:
        """Read the log as it is now and plan how to begin."""
        seen = position_of(log.entries)
        self.read = len(log.entries)
        if seen.ended:
            self.refused = True
            return
        self.epoch = max([entry.epoch for entry in log.entries], default=0) + 1
        self.first_seq = seen.next_seq
        types = ["started" if seen.next_seq == 0 else "restarted" if restart else TERMINAL]
        if types[0] != TERMINAL:
            types += self.script
        self.events = [
            Entry(type_, self.epoch, self.first_seq + i, self.name, f"{self.name}:{i}") for i, type_ in enumerate(types)
        ]

    def open(self, log: Log) -> None:
        """Try the conditional first append with the last read state, which may be old."""
        stored = log.append_if(self.events[0], self.read)
        self.opened, self.refused = stored is not None, stored is None
        self.last_counted = stored or 0

    @property
    def done(self) -> bool:
        return self.base >= len(self.events)

    def send(self) -> None:
        """Publish the next event of the window."""
        if self.sent < len(self.events):
            self.connections[-1].append(Copy(self.sent, self.events[self.sent]))
            self.sent += 1

    def go_back(self, *, reconnect: bool) -> None:
        """Publish again from the first unacknowledged event on, perhaps over a new connection."""
        if reconnect:
            self.connections.append([])
        again, self.sent = self.sent, self.base
        while self.sent < again:
            self.send()

    def deliver(self, log: Log, connection: int, *, lose: bool, lose_ack: bool) -> None:
        """The oldest copy on a connection reaches the log, or is lost. Each connection keeps its order."""
        queue = self.connections[connection % len(self.connections)]
        if not queue:
            return
        copy = queue.pop(0)
        if lose:
            return
        stored = log.append(copy.entry)
        if not lose_ack:
            self.pending.append((copy.index, stored))

    def hear(self, which: int) -> None:
        """Any acknowledgement under way arrives, in any order; it counts only above that of the event before."""
        if not self.pending:
            return
        index, stored = self.pending.pop(which % len(self.pending))
        self.acknowledged[index] = max(stored, self.acknowledged.get(index, 0))
        while self.acknowledged.get(self.base, 0) > self.last_counted:
            self.last_counted = self.acknowledged[self.base]
            self.base += 1

    def finish(self, log: Log) -> None:
        """Deliver everything in order until all is acknowledged."""
        for connection in range(len(self.connections)):
            while self.connections[connection]:
                self.deliver(log, connection, lose=False, lose_ack=False)
        while self.pending:
            self.hear(0)
        while self.sent < len(self.events):
            self.send()
        self.go_back(reconnect=True)
        while self.connections[-1]:
            self.deliver(log, -1, lose=False, lose_ack=False)
        while self.pending:
            self.hear(0)
