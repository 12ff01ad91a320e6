"""Join the deliveries of the durable consumer to the position in the database.

The position moves over the log in order and without holes; the delivery order of the consumer is only a hint. After a
crash it redelivers unacknowledged events, and later than newer events.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from services.billing.core.intake import Record

__all__ = ["Joined", "holes", "join"]


class Joined(NamedTuple):
    """The records that follow the position without a hole, the number of repeats before it, and the end of a read-back.

    ``read_up_to`` is set if a record between the position and the last delivered one is missing: then ``ready`` is
    empty and the whole range is read from the log.
    """

    ready: Sequence[Record]
    repeats: int
    read_up_to: int | None


def join(applied: int, delivered: Sequence[Record]) -> Joined:
    """Join ``delivered`` to the position after the stream sequence ``applied``."""
    count = len(delivered)
    if not count:
        return Joined([], 0, None)
    if delivered[0].seq == applied + 1 and delivered[-1].seq == applied + count and _ascending(delivered):
        return Joined(delivered, 0, None)
    fresh = {r.seq: r for r in delivered if r.seq > applied}
    repeats = count - len(fresh)
    if not fresh:
        return Joined([], repeats, None)
    last = max(fresh)
    if last - applied == len(fresh):
        return Joined([fresh[seq] for seq in range(applied + 1, last + 1)], repeats, None)
    return Joined([], repeats, last)


def holes(applied: int, records: Sequence[Record]) -> list[tuple[int, int]]:
    """Return the first and last stream sequence of each hole after ``applied`` and between ``records``."""
    if not records or records[-1].seq - applied == len(records):
        return []
    before = [applied, *(r.seq for r in records)]
    return [(a + 1, b - 1) for a, b in pairwise(before) if b - a > 1]


def _ascending(records: Sequence[Record]) -> bool:
    return all(records[i].seq < records[i + 1].seq for i in range(len(records) - 1))
