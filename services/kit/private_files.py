"""Private files and folders: modes 0600 and 0700, whatever the umask and their previous modes."""

import os
import stat
from pathlib import Path
from typing import Final

__all__ = ["UMASK", "private_file", "private_folder", "tighten"]

UMASK: Final = 0o077
"""Umask of processes that write files, so that files created by libraries are private too."""


def private_folder(path: Path) -> str | None:
    """Create a folder if missing, and make it private; return the warning of `tighten`.

    Raises:
        OSError: it cannot be created.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return tighten(path)


def private_file(path: Path) -> str | None:
    """Create an empty file if missing, and make it private; return the warning of `tighten`.

    Raises:
        OSError: it cannot be created.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    return tighten(path)


def tighten(path: Path) -> str | None:
    """Remove all permissions of group and others; return a warning if that is not possible.

    A missing file and a symbolic link are unchanged.
    """
    try:
        found = path.lstat()
        if not stat.S_ISLNK(found.st_mode) and found.st_mode & UMASK:
            path.chmod(stat.S_IMODE(found.st_mode) & ~UMASK)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"others may read {path}, and its mode cannot be changed: {error.strerror}"
    return None
