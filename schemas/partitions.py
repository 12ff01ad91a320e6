"""Determine the partition of a session when the number of partitions has changed over time. Pure.

The history of partition counts is kept in the model registry's bucket, oldest first. A session's candidates are the
partitions of its hash under each count. A session stays in the partition of its stored events until the last of them
has expired, and only then moves to its partition under the newest count.
"""

from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from schemas.subjects import partition_of
from schemas.topology import REGISTRY_BUCKET

__all__ = [
    "HISTORY_SUBJECT",
    "HistoryUnreadable",
    "candidates",
    "decode_history",
    "encode_history",
    "extended",
    "settled",
]

# Two tokens below the bucket: pools, which may have any name, announce themselves under one.
HISTORY_SUBJECT: Final = f"$KV.{REGISTRY_BUCKET}.topology.partitions"


class HistoryUnreadable(ValueError):
    """The stored history of partition counts is invalid."""


def extended(history: Sequence[int], count: int) -> tuple[int, ...]:
    """Return ``history`` with ``count`` as its newest entry; each count occurs once."""
    return (*(n for n in history if n != count), count)


def candidates(tenant: str, session: str, history: Sequence[int]) -> tuple[int, ...]:
    """Return the partitions that may keep a session, without repetition, the newest count's first."""
    return tuple(dict.fromkeys(partition_of(tenant, session, count) for count in reversed(history)))


def settled(options: Sequence[int], holding: Collection[int]) -> int:
    """Return a session's partition.

    ``options``: its `candidates`. ``holding``: those whose log keeps events of it; the one of the oldest count wins.
    """
    return next((partition for partition in reversed(options) if partition in holding), options[0])


def encode_history(history: Sequence[int]) -> bytes:
    """Return the history as stored: a JSON list."""
    return msgspec.json.encode(list(history))


def decode_history(data: bytes) -> tuple[int, ...]:
    """Decode a stored history.

    Raises:
        HistoryUnreadable: ``data`` is not a list of one or more counts from 1 to 256.
    """
    try:
        history = msgspec.json.decode(data, type=tuple[int, ...])
    except msgspec.DecodeError as error:
        raise HistoryUnreadable(f"{HISTORY_SUBJECT} contains {data[:80]!r}: {error}") from error
    if not history or not all(1 <= count <= 256 for count in history):
        raise HistoryUnreadable(f"{HISTORY_SUBJECT} contains {data[:80]!r}: use a list of counts from 1 to 256")
    return history
