"""Marks: what is remembered of each log beside it, so that a log that has lost its end is noticed. Pure.

A damaged file, an older store put back, or a power cut may take events off the end of a log; the broker then uses their
stream sequences again. A mark names the newest message that was seen: its stream sequence, and the time at which the
broker stored it, which no other message has. A log that ends before its mark, or has another message there, has
regressed. It begins a new *era*: cursors and positions of the era before are not taken for positions in it.
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

# Two tokens below the bucket, as the history of partitions has.
_PREFIX: Final = f"$KV.{REGISTRY_BUCKET}.log."
MARKS_SUBJECT: Final = f"{_PREFIX}*"
"""Covers the marks of all partitions."""


class Mark(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was seen last of a partition's log.

    ``created``: the time of creation of its stream, as the broker writes it. ``seq`` and ``stamp``: stream sequence of
    the newest message, and when it was stored, in nanoseconds since 1970 by the broker's clock (0: not known).
    ``first``: stream sequence of the oldest message. ``holes``: how many are missing between the two. ``era``: empty
    until the log has lost something once. ``base``: up to this stream sequence the log holds what it held in the era
    before. ``lost``: the last stream sequence that was known in the era before (0 in the first one). ``reused``:
    whether those between are other messages now, and not missing. ``repaired``: whether what the loss has left without
    an end has been closed.
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
    """Return a stored mark; ``None`` for what is none, which counts as not there."""
    try:
        return msgspec.json.decode(data, type=Mark)
    except msgspec.DecodeError:
        return None


def incarnation(created: str, era: str) -> str:
    """Return the name under which positions in a log are kept: another one means that they hold no more."""
    return f"{created} {era}" if era else created


def regression(mark: Mark, created: str, last_seq: int, stamp: int | None) -> str | None:
    """Return why a log is not the continuation of what ``mark`` says of it; ``None`` when it is.

    ``stamp``: when the message at the mark's stream sequence was stored; ``None`` when it is not known, or the log
    holds no message there (it may have expired or been deleted, which proves nothing).
    """
    if mark.created != created:
        return "the stream was created anew"
    if last_seq < mark.seq:
        return f"it ends at {last_seq}, and reached {mark.seq} before"
    if mark.stamp and stamp is not None and stamp != mark.stamp:
        return f"it holds another message at {mark.seq} than before"
    return None


def beyond(mark: Mark, last_seq: int, first_later: int | None) -> int:
    """Return the last stream sequence up to which a log that has regressed holds what it held before.

    ``first_later``: the first message that was stored after the mark's, if there is one. Clocks may err, the mark's own
    message is certainly gone: so it is never more than what comes before that.
    """
    end = last_seq if first_later is None else first_later - 1
    return max(0, min(end, mark.seq - 1, last_seq))
