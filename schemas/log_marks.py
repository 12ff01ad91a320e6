"""Watermarks of the logs, kept outside them to detect a log that has lost its end. Pure.

A damaged file, a restored older store, or a power cut may remove events from the end of a log; the broker then reuses
their stream sequences. A mark records the newest message seen: its stream sequence, and the time at which the broker
stored it, which is unique. A log that ends before its mark, or has another message there, has regressed. It begins a
new *era*: cursors and positions of the previous era are invalid in it.
"""

from typing import Final

import msgspec

from schemas.topology import REGISTRY_BUCKET

__all__ = [
    "MARKS_SUBJECT",
    "Mark",
    "beyond",
    "decode_mark",
    "incarnation",
    "mark_subject",
    "regression",
]

# Two tokens below the bucket, like the history of partition counts.
_PREFIX: Final = f"$KV.{REGISTRY_BUCKET}.log."
MARKS_SUBJECT: Final = f"{_PREFIX}*"
"""Filter of the marks of all partitions."""


class Mark(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The watermark of a partition's log.

    ``created``: creation time of the stream, as the broker prints it. ``seq`` and ``stamp``: stream sequence of the
    newest message, and the time at which it was stored, in nanoseconds since 1970 by the broker's clock (0: unknown).
    ``first``: stream sequence of the oldest message. ``holes``: number of messages missing between the two. ``era``:
    empty before the first regression. ``base``: last stream sequence whose messages are unchanged from the previous
    era. ``lost``: last stream sequence seen in the previous era (0 in the first era). ``reused``: whether other
    messages have the stream sequences between these two; otherwise those are missing. ``repaired``: whether the
    generations left without a terminal by the loss have been closed.
    """

    created: str
    seq: int = 0
    stamp: int = 0
    era: str = ""
    base: int = 0
    lost: int = 0
    reused: bool = False
    repaired: bool = False
    first: int = 0
    holes: int = 0


def mark_subject(partition: int) -> str:
    """Return the subject that keeps a partition's mark."""
    return f"{_PREFIX}{partition}"


def decode_mark(data: bytes) -> Mark | None:
    """Decode a stored mark; return ``None`` for invalid bytes, which count as no mark."""
    try:
        return msgspec.json.decode(data, type=Mark)
    except msgspec.DecodeError:
        return None


def incarnation(created: str, era: str) -> str:
    """Return the name of a log's incarnation; positions of another incarnation are invalid."""
    return f"{created} {era}" if era else created


def regression(mark: Mark, created: str, last_seq: int, stamp: int | None) -> str | None:
    """Return the reason why a log has regressed from ``mark``, or ``None`` when it continues it.

    ``stamp``: storage time of the message at the mark's stream sequence; ``None`` when it is unknown, or when the log
    has no message there (an expired or deleted message proves nothing).
    """
    if mark.created != created:
        return "the stream was re-created"
    if last_seq < mark.seq:
        return f"it ends at {last_seq}, but had reached {mark.seq}"
    if mark.stamp and stamp is not None and stamp != mark.stamp:
        return f"its message at {mark.seq} has changed"
    return None


def beyond(mark: Mark, last_seq: int, first_later: int | None) -> int:
    """Return the last stream sequence up to which a regressed log is unchanged.

    ``first_later``: the first message stored after the mark's message, if any. The result is below the mark's own
    stream sequence, whatever the clocks show: that message is certainly lost.
    """
    end = last_seq if first_later is None else first_later - 1
    return max(0, min(end, mark.seq - 1, last_seq))
