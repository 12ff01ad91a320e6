"""The history of a run: one record a line, as JSON. Times ``t`` in seconds since the start of the run."""

from pathlib import Path
from typing import Any

import msgspec

from bench.chaos.schedule import Fault, Schedule

__all__ = [
    "AnyRecord",
    "Amounts",
    "Billed",
    "CancelAsked",
    "Connected",
    "Exited",
    "Exported",
    "Got",
    "Healed",
    "Hit",
    "History",
    "Left",
    "Logged",
    "Memory",
    "Opened",
    "Posted",
    "Quiet",
    "Said",
    "Sent",
    "SentEnd",
    "Served",
    "Stuck",
    "Worked",
    "read_history",
]


class Record(msgspec.Struct, tag_field="kind", kw_only=True, omit_defaults=True):
    """Fields of all records."""

    t: float = 0.0


class Opened(Record, tag="opened"):
    """The run begins at ``wall``, in seconds since 1970. With the ``lease`` and the checker's ``memory`` bounds."""

    schedule: Schedule
    wall: float
    lease: float
    memory: dict[str, int] = {}
    planted: str = ""


class Sent(Record, tag="sent"):
    """The provider sent this piece of text in its call number ``call`` (from 1) for ``key``."""

    key: str
    call: int
    text: str


class SentEnd(Record, tag="sent_end"):
    """A call at the provider has ended. ``how``: ``end`` (with its end marker), ``cut``, ``error``, ``refused``, or
    ``left`` when the producer closed it.
    """

    key: str
    call: int
    how: str


class Posted(Record, tag="posted"):
    """A request was accepted (202) at ``t``; ``seconds``: the provider's time for it."""

    ask: int
    key: str
    session: str
    generation: str
    cursor: str
    seconds: float
    tries: int = 1


class CancelAsked(Record, tag="cancel"):
    """A cancellation was requested (recorded before it is sent); the response's ``status`` is in a second record."""

    generation: str
    status: int = 0


class Connected(Record, tag="connected"):
    """A subscriber has connected with its last id; ``status`` of the response, 0 without one."""

    watch: int
    replica: int
    cursor: str | None
    status: int


class Got(Record, tag="got"):
    """A subscriber received an event: its id and its data as on the wire.

    For a protocol without JSON, ``data`` is empty, and the other fields identify the event and its text.
    """

    watch: int
    cursor: str
    data: str = ""
    generation: str = ""
    epoch: int = 0
    seq: int = 0
    type: str = ""
    text: str = ""


class Said(Record, tag="said"):
    """A subscriber received a control event, or an HTTP error (``event``: ``status``)."""

    watch: int
    event: str
    data: str


class Stuck(Record, tag="stuck"):
    """A subscriber has not read from a connection for a while. ``ended``: the server evicted it meanwhile."""

    watch: int
    ended: bool


class Left(Record, tag="left"):
    """A subscriber has finished. ``complete``: by its own judgement it received all expected events."""

    watch: int
    session: str
    generation: str | None
    start: int
    complete: bool


class Served(Record, tag="served"):
    """A worker received an event from its durable consumer, as delivery number ``deliveries``."""

    worker: int
    consumer: str
    data: str
    deliveries: int


class Worked(Record, tag="worked"):
    """A worker's acknowledgements were confirmed, with their number. ``done``: it has finished and acknowledged all."""

    worker: int
    consumer: str
    acked: int = 0
    done: bool = False


class Exported(Record, tag="exported"):
    """A provider's export was accepted (200) by billing."""

    generation: str
    input: int
    output: int


class Hit(Record, tag="fault"):
    """A fault begins."""

    fault: Fault


class Healed(Record, tag="healed"):
    """A fault has been healed: processes run again, connections work."""

    number: int


class Quiet(Record, tag="quiet"):
    """The schedule has ended; there are no faults after this. ``slowness``: of the machine at this time."""

    slowness: float = 1.0


class Exited(Record, tag="exited"):
    """A process ended. ``asked``: after SIGTERM, within ``seconds``; otherwise by itself. ``age``: its run time."""

    process: str
    code: int
    asked: bool
    seconds: float = 0.0
    age: float = 0.0
    output: str = ""


class Memory(Record, tag="memory"):
    """The peak resident memory of one process, in bytes."""

    process: str
    peak: int


class Logged(Record, tag="logged"):
    """A message in the final log."""

    partition: int
    seq: int
    subject: str
    data: str


class Billed(Record, tag="billed"):
    """A row of billing's final table."""

    row: dict[str, Any]


class Amounts(Record, tag="amounts"):
    """Billing's final amounts: ledger entries, spending sums, and open reservations."""

    entries: list[dict[str, Any]]
    spending: list[dict[str, Any]]
    reserved: list[dict[str, Any]]


AnyRecord = (
    Opened
    | Sent
    | SentEnd
    | Posted
    | CancelAsked
    | Connected
    | Got
    | Said
    | Stuck
    | Left
    | Served
    | Worked
    | Exported
    | Amounts
    | Hit
    | Healed
    | Quiet
    | Exited
    | Memory
    | Logged
    | Billed
)
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyRecord] = msgspec.json.Decoder(AnyRecord)


class History:
    """Records in memory and in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[AnyRecord] = []
        self._file = path.open("wb")

    def add(self, record: AnyRecord) -> None:
        """Append a record."""
        self.records.append(record)
        self._file.write(_encoder.encode(record) + b"\n")

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()


def read_history(path: Path) -> list[AnyRecord]:
    """Return the records of a file, without a truncated last line."""
    return [_decoder.decode(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
