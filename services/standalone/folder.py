"""Lock the data folder, so that only one ``tailrace up`` uses it."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from services.kit.private_files import private_folder, tighten
from services.standalone.errors import CannotStart, FolderInUse

__all__ = ["holder_of", "locked"]


def holder_of(folder: Path) -> str | None:
    """Return the description left by the process that holds the lock of ``folder``, or ``None`` when it is free."""
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
    """Create the folder if missing and hold its exclusive lock while the block runs.

    Yields a function that sets the description of this process for others (`holder_of`). The kernel releases the lock
    when the process ends for any reason, so a stale lock file never blocks.

    Raises:
        FolderInUse: another process holds the lock.
        CannotStart: the folder cannot be created or written.
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
