"""The data folder: everything that outlives a run, and the lock that keeps a second run out."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from services.kit.private_files import private_folder, tighten
from services.standalone.errors import CannotStart, FolderInUse

__all__ = ["holder_of", "locked"]


def holder_of(folder: Path) -> str | None:
    """Return what the process that holds the lock of ``folder`` says of itself; ``None`` where none does."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 500).decode(errors="replace").strip()
    else:
        return None
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, warn: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Create the folder where needed and hold its lock while the block runs. Nobody else may enter it.

    Yields a function that sets what another process is told about this one. The kernel
    drops the lock with its process, however that ends: a lock file alone never blocks.

    Raises:
        FolderInUse: another process holds the lock.
        CannotStart: the folder cannot be made or written.
    """
    try:
        warnings = [private_folder(folder), private_folder(folder / "logs")]
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        warnings += [tighten(found) for found in (*folder.iterdir(), *(folder / "logs").iterdir())]
    except OSError as error:
        raise CannotStart(f"cannot write to the data folder {folder}: {error.strerror}") from error
    for warning in filter(None, warnings):
        warn(warning)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(descriptor, 500).decode(errors="replace").strip()
            raise FolderInUse(str(folder), other) from None
        try:
            yield lambda text: _rewrite(descriptor, text)
        finally:
            _rewrite(descriptor, "")
    finally:
        os.close(descriptor)


def _rewrite(descriptor: int, text: str) -> None:
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
