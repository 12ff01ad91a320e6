"""The records of a history, grouped by subject. Pure."""

from collections.abc import Iterable

import msgspec

from bench.chaos.history import (
    Amounts,
    AnyRecord,
    Billed,
    CancelAsked,
    Connected,
    Exited,
    Exported,
    Got,
    Healed,
    Hit,
    Left,
    Logged,
    Memory,
    Opened,
    Posted,
    Quiet,
    Said,
    Sent,
    SentEnd,
    Served,
    Stuck,
    Worked,
)
from bench.chaos.told import Told, tell

__all__ = ["Call", "Evidence"]


class Call(msgspec.Struct):
    """One call at the provider: the text sent, and how it ended (``open`` if it did not)."""

    text: str = ""
    how: str = "open"


class Evidence(msgspec.Struct):
    """The evidence of a run."""

    opened: Opened
    calls: dict[str, dict[int, Call]] = {}
    posted: dict[str, Posted] = {}
    cancels: list[CancelAsked] = []
    connected: list[Connected] = []
    got: dict[int, list[Got]] = {}
    said: list[Said] = []
    stuck: list[Stuck] = []
    left: list[Left] = []
    faults: list[tuple[Hit, float | None]] = []
    quiet: float | None = None
    slowness: float = 1.0
    exited: list[Exited] = []
    memory: list[Memory] = []
    told: dict[str, Told] = {}
    billed: list[Billed] = []
    served: dict[str, list[Served]] = {}
    worked: dict[str, list[Worked]] = {}
    exported: dict[str, list[Exported]] = {}
    amounts: Amounts | None = None

    @classmethod
    def of(cls, records: Iterable[AnyRecord]) -> "Evidence":
        """Group the records of one run.

        Raises:
            ValueError: the first record does not open a run.
        """
        every = list(records)
        if not every or not isinstance(every[0], Opened):
            raise ValueError("not the history of a run: the first record must be `opened`")
        found = cls(every[0])
        logged: list[Logged] = []
        for record in every[1:]:
            if isinstance(record, Logged):
                logged.append(record)
            else:
                found.take(record)
        found.told = tell(logged)
        return found

    def take(self, record: AnyRecord) -> None:
        """Add one record."""
        match record:
            case Sent():
                self._call(record.key, record.call).text += record.text
            case SentEnd():
                self._call(record.key, record.call).how = record.how
            case Posted():
                self.posted[record.generation] = record
            case CancelAsked():
                self.cancels.append(record)
            case Connected():
                self.connected.append(record)
            case Got():
                self.got.setdefault(record.watch, []).append(record)
            case Said():
                self.said.append(record)
            case Stuck():
                self.stuck.append(record)
            case Left():
                self.left.append(record)
            case Hit():
                self.faults.append((record, None))
            case Healed():
                self.faults = [
                    (hit, record.t if hit.fault.number == record.number else healed) for hit, healed in self.faults
                ]
            case Quiet():
                self.quiet, self.slowness = record.t, record.slowness
            case Exited():
                self.exited.append(record)
            case Memory():
                self.memory.append(record)
            case Billed():
                self.billed.append(record)
            case Served():
                self.served.setdefault(record.consumer, []).append(record)
            case Worked():
                self.worked.setdefault(record.consumer, []).append(record)
            case Exported():
                self.exported.setdefault(record.generation, []).append(record)
            case Amounts():
                self.amounts = record
            case _:
                pass

    def _call(self, key: str, number: int) -> Call:
        return self.calls.setdefault(key, {}).setdefault(number, Call())

    def undisturbed(self, begin: float, end: float, rest: float) -> float:
        """Return the seconds from ``begin`` to ``end`` without a fault, or one healed less than ``rest`` before."""
        quiet, reached = 0.0, begin
        spans = sorted((hit.t, (end if healed is None else healed) + rest) for hit, healed in self.faults)
        for start, stop in spans:
            if start > end:
                break
            quiet += max(0.0, start - reached)
            reached = max(reached, stop)
        return quiet + max(0.0, end - reached)
