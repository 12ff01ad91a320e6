"""Measure the size of the data folder and the free space on its disk."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

__all__ = ["DiskUse", "disk_use", "human_bytes"]


class DiskUse(NamedTuple):
    """Sizes in bytes: ``used`` by ``folder``, ``free`` and ``total`` of its file system."""

    folder: str
    used: int
    free: int
    total: int

    def text(self) -> str:
        """Return the sizes as text for a person."""
        return f"{human_bytes(self.used)} used, {human_bytes(self.free)} free of {human_bytes(self.total)}"


def disk_use(folder: Path) -> DiskUse | None:
    """Return the disk use of ``folder``, or ``None`` when there is no such folder."""
    if not folder.is_dir():
        return None
    used = 0
    for parent, _folders, files in os.walk(folder):
        for name in files:
            try:
                used += (Path(parent) / name).lstat().st_size
            except OSError:
                continue  # removed meanwhile, or not readable
    disk = shutil.disk_usage(folder)
    return DiskUse(str(folder), used, disk.free, disk.total)


def human_bytes(count: int) -> str:
    """Return a number of bytes with a binary unit, as in ``1.4 GiB``."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
