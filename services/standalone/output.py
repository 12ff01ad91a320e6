"""What a child process writes: kept in bounded files, and warnings shown on the terminal. Lines are judged purely."""

import json
import logging
import re
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final

__all__ = ["LineSplitter", "OutputFile", "brief"]

MAX_LINE: Final = 64 * 1024
FILE_BYTES: Final = 8 * 1024 * 1024
FILES_KEPT: Final = 2
_NATS: Final = re.compile(r"\[\d+\] \S+ \S+ \[(?P<level>[A-Z]{3})\] (?P<text>.*)")
_CALM: Final = re.compile(r"(INFO|DEBUG)\b")
_KNOWN: Final = "Maximum payloads over"
"""What nats-server warns of because requests may be large, which is wanted."""
_LOUD: Final = frozenset({"warning", "error", "critical", "exception"})
_OMITTED: Final = frozenset({"event", "level", "timestamp", "service", "exception"})


class LineSplitter:
    """Cuts bytes into lines. A line longer than ``MAX_LINE`` bytes is cut, so that memory stays bounded."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            lines.append(self._rest)
            self._rest = b""
        return [line[:MAX_LINE].decode(errors="replace").rstrip("\r") for line in lines]

    def finish(self) -> list[str]:
        """Return the last line when no line end came after it."""
        rest, self._rest = self._rest, b""
        return [rest[:MAX_LINE].decode(errors="replace")] if rest else []


def brief(line: str) -> str | None:
    """Return what the terminal shows of a log line; ``None`` for one that stays in the file.

    Shown are warnings and worse, and plain text: a service writes it only when it could not log in its own form.
    """
    if match := _NATS.fullmatch(line):
        is_known = match["text"].startswith(_KNOWN)
        return match["text"] if match["level"] in {"WRN", "ERR", "FTL"} and not is_known else None
    try:
        record = json.loads(line)
    except ValueError:
        return None if _CALM.match(line) else line.rstrip() or None
    if not isinstance(record, dict):
        return line
    return _brief_record(record) if str(record.get("level", "")).lower() in _LOUD else None


def _brief_record(record: dict[str, Any]) -> str:
    details = " ".join(f"{key}={value}" for key, value in record.items() if key not in _OMITTED)
    failure = str(record.get("exception") or "").strip().rsplit("\n", 1)[-1]
    return "  ".join(part for part in (str(record.get("event", "")), details[:300], failure[:300]) if part)


class _Handler(RotatingFileHandler):
    """Loses lines that the disk does not take, instead of writing a traceback for each to the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the library's name
        """Let it be: what matters is shown on the terminal too."""


class OutputFile:
    """The log file of one service: appended to, and rotated when it grows beyond 8 MiB (two old ones are kept)."""

    def __init__(self, path: Path, show: Callable[[str], None]) -> None:
        self.path = path
        self._show = show
        self._handler = _Handler(path, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8")
        self._splitter = LineSplitter()

    def feed(self, data: bytes) -> None:
        """Take what the process wrote."""
        self._write(self._splitter.feed(data))

    def finish(self) -> None:
        """Take the end of the process's output."""
        self._write(self._splitter.finish())

    def close(self) -> None:
        """Close the file."""
        self._handler.close()

    def _write(self, lines: list[str]) -> None:
        for line in lines:
            self._handler.emit(logging.LogRecord("child", logging.INFO, "", 0, line, None, None))
            if (shown := brief(line)) is not None:
                self._show(shown)
