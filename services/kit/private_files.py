"""Files and folders that belong to the user alone: 0600 and 0700, whatever the umask and whatever they were before."""

import os
import stat
from pathlib import Path
from typing import Final

__all__ = ["UMASK", "private_file", "private_folder", "tighten"]

UMASK: Final = 0o077
"""What processes that write files run with, so that the files which libraries create are private too."""


def private_folder(path: Path) -> str | None:
    """Create a folder where needed, and let nobody else enter it; return what `tighten` does.

    Raises:
        OSError: it cannot be created.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return tighten(path)


def private_file(path: Path) -> str | None:
    """Create an empty file where there is none, and let nobody else read it; return what `tighten` does.

    Raises:
        OSError: it cannot be created.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    return tighten(path)


def tighten(path: Path) -> str | None:
    """Take from everybody else what they may do with a file or folder; return a warning where that is not possible.

    A file that is not there, and a symbolic link, are left as they are.
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
