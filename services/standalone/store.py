"""Repair the embedded broker's store before a start, and detect a crash of the machine."""

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
"""Largest stream whose messages are read again at each start."""


def is_position(data: bytes) -> bool:
    """Return whether nats-server can read these bytes as a consumer's position (``o.dat``); an empty file is valid.

    Format: magic and version, acknowledged and delivered sequences, pending and redelivered messages, all as varints
    (nats-server, ``decodeConsumerState``). With an unreadable file the server neither loads nor creates a consumer of
    that name.
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
    """Move unreadable consumer positions from nats-server's store to ``aside``; return the names of the consumers.

    Such a consumer restarts at the beginning of its stream. Call this only while the server does not run.
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
            continue  # the server logs the problem
        moved.append(f"{consumer} of {stream}")
    return moved


def drop_indexes(store: Path) -> None:
    """Remove the indexes of small streams from a nats-server's store, so that the server reads their messages again.

    The server trusts an index; when the indexed messages are damaged, it loses new messages or stops answering. Call
    this only while the server does not run.
    """
    for index in store.glob("jetstream/*/streams/*/msgs/index.db"):
        try:
            if sum(block.stat().st_size for block in index.parent.glob("*.blk")) <= SMALL_BYTES:
                index.unlink()
        except OSError:
            continue  # the server logs the problem


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the file system of a folder."""
    return shutil.disk_usage(folder).free


@contextmanager
def running_mark(data: Path) -> Iterator[bool]:
    """Keep a marker file while the block runs; yield whether the machine crashed during the previous run.

    Such a crash loses unsynced writes, so the log may end before its readers' positions.
    """
    path, boot = data / "running", _boot()
    try:
        before = path.read_text().strip()
    except OSError:
        before = ""
    with suppress(OSError):  # on a full disk the next crash goes undetected
        path.write_text(boot)
    yield bool(before and boot and before != boot)
    path.unlink(missing_ok=True)


def _boot() -> str:
    """Return the kernel's boot id, or an empty string when it is unreadable."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""
