"""Damage to a stopped nats-server's files: one way for each kind of file of a stream."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

__all__ = ["DAMAGES", "LOSING", "stream_folder"]


def stream_folder(store: Path, stream: str = "TOKENS_0") -> Path:
    """Return the folder in which a server with this store keeps a stream."""
    return store / "jetstream" / "$G" / "streams" / stream


def _last_block(folder: Path) -> Path:
    return max((folder / "msgs").glob("*.blk"), key=lambda path: int(path.stem))


def _overwrite(folder: Path) -> None:
    path = _last_block(folder)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(300))


def _truncate(folder: Path) -> None:
    path = _last_block(folder)
    os.truncate(path, path.stat().st_size // 2)


def _zero(folder: Path) -> None:
    path = _last_block(folder)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\0" * (size - size // 2))


def _without_index(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        damage(folder)
        (folder / "msgs" / "index.db").unlink()

    return both


def _consumer_files(folder: Path, name: str) -> list[Path]:
    return list((folder / "obs").glob(f"*/{name}"))


def _in_consumers(name: str, data: bytes | None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for path in _consumer_files(folder, name):
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)

    return write


def _write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


DAMAGES: Final[dict[str, Callable[[Path], None]]] = {
    "block-overwritten": _overwrite,
    "block-overwritten-no-index": _without_index(_overwrite),
    "block-truncated": _truncate,
    "block-truncated-no-index": _without_index(_truncate),
    "block-zeroed": _zero,
    "block-missing": lambda folder: _last_block(folder).unlink(),
    "block-empty": lambda folder: os.truncate(_last_block(folder), 0),
    "index-missing": lambda folder: (folder / "msgs" / "index.db").unlink(),
    "index-garbage": _write("msgs/index.db", b"\x07" * 500),
    "meta-missing": lambda folder: (folder / "meta.inf").unlink(),
    "meta-garbage": _write("meta.inf", b"garbage"),
    "sum-garbage": _write("meta.sum", b"0" * 16),
    "positions-missing": _in_consumers("o.dat", None),
    "positions-empty": _in_consumers("o.dat", b""),
    "consumer-meta-garbage": _in_consumers("meta.inf", b"garbage"),
    "consumers-missing": lambda folder: shutil.rmtree(folder / "obs", ignore_errors=True),
    "messages-missing": lambda folder: shutil.rmtree(folder / "msgs"),
    "stream-missing": shutil.rmtree,
}
LOSING: Final = frozenset(
    {
        "block-overwritten",
        "block-overwritten-no-index",
        "block-truncated",
        "block-truncated-no-index",
        "block-zeroed",
        "block-missing",
        "block-empty",
        "messages-missing",
        "stream-missing",
    }
)
"""Kinds that take events with them."""
