"""The embedded broker's files: what of them nats-server would stumble over, and whether the machine went down."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

__all__ = ["drop_indexes", "free_bytes", "is_position", "running_mark", "set_aside_unreadable"]

_MAGIC: Final = 22
_VERSIONS: Final = (1, 2)
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_HIGH: Final = 1 << 63
SMALL_BYTES: Final = 256 * 1024 * 1024
"""Bound of a stream that is read over at each start."""


def is_position(data: bytes) -> bool:
    """Tell whether nats-server can read these bytes as a consumer's position (``o.dat``); an empty file is one.

    Format: magic and version, acknowledged and delivered sequences, pending and redelivered messages, all as varints
    (nats-server, ``decodeConsumerState``). With a file that it cannot read the server has no such consumer and makes
    none of that name.
    """
    if not data:
        return True
    if len(data) < 2 or data[0] != _MAGIC or data[1] not in _VERSIONS:
        return False
    numbers = _varints(data[2:])
    try:
        sequences = [next(numbers) for _ in range(4)]
        pending = next(numbers)
        for _ in range(1 + pending * (3 if data[1] == 2 else 2) if pending else 0):
            next(numbers)
        for _ in range(2 * next(numbers)):
            next(numbers)
    except StopIteration:
        return False
    return all(number < _HIGH for number in sequences)


def _varints(data: bytes) -> Iterator[int]:
    value, shift = 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield value
            value, shift = 0, 0


def set_aside_unreadable(store: Path, aside: Path) -> list[str]:
    """Move the positions of consumers that nats-server could not read out of its store; return whose they were.

    Such a consumer begins again with what its stream keeps. To be called while the server does not run.
    """
    moved = []
    for path in sorted(store.glob("jetstream/*/streams/*/obs/*/o.dat")):
        try:
            if is_position(path.read_bytes()):
                continue
            consumer, stream = path.parent.name, path.parent.parent.parent.name
            aside.mkdir(parents=True, exist_ok=True)
            shutil.move(path, aside / f"{time.time_ns()}-{stream}-{consumer}-o.dat")
        except OSError:
            continue  # the server says what is wrong with it
        moved.append(f"{consumer} of {stream}")
    return moved


def drop_indexes(store: Path) -> None:
    """Remove the indexes of small streams from a nats-server's store, so that it reads their messages over.

    It believes an index; where the messages behind it are damaged it then loses new ones, or answers nobody. To be
    called while the server does not run.
    """
    for index in store.glob("jetstream/*/streams/*/msgs/index.db"):
        try:
            if sum(block.stat().st_size for block in index.parent.glob("*.blk")) <= SMALL_BYTES:
                index.unlink()
        except OSError:
            continue  # the server says what is wrong with it


def free_bytes(folder: Path) -> int:
    """Return how many bytes can be written below a folder."""
    return shutil.disk_usage(folder).free


@contextmanager
def running_mark(data: Path) -> Iterator[bool]:
    """Keep a file while the block runs; yield whether the machine went down while it was kept the last time.

    What had not been written to disk by then is lost, and the log may end earlier than its readers have come.
    """
    path, boot = data / "running", _boot()
    try:
        before = path.read_text().strip()
    except OSError:
        before = ""
    with suppress(OSError):  # a full disk: then nothing is known the next time
        path.write_text(boot)
    yield bool(before and boot and before != boot)
    path.unlink(missing_ok=True)


def _boot() -> str:
    """Return what names this start of the machine; empty where that cannot be known."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""
