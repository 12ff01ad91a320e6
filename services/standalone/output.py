"""Write the output of child processes to bounded log files and show its warnings on the terminal."""

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
"""Start of nats-server's warning about a large ``max_payload``, which is intended here."""
_LOUD: Final = frozenset({"warning", "error", "critical", "exception"})
_OMITTED: Final = frozenset({"event", "level", "timestamp", "service", "exception"})


class LineSplitter:
    """Split bytes into lines; cut lines at ``MAX_LINE`` bytes to bound memory."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Add ``data``; return the lines completed by it."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            lines.append(self._rest)
            self._rest = b""
        return [line[:MAX_LINE].decode(errors="replace").rstrip("\r") for line in lines]

    def finish(self) -> list[str]:
        """Return the last line if it has no line end."""
        rest, self._rest = self._rest, b""
        return [rest[:MAX_LINE].decode(errors="replace")] if rest else []


def brief(line: str) -> str | None:
    """Return the terminal's text for a log line, or ``None`` for a line that goes only to the file.

    Warnings and worse are shown, and so is plain text: a service writes it only when structured logging failed.
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
    """Drop lines that cannot be written to disk, instead of printing a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the library's name
        """Ignore the error: warnings are shown on the terminal as well."""


class OutputFile:
    """Append-only log file of one service, rotated at 8 MiB; two old files are kept."""

    def __init__(self, path: Path, show: Callable[[str], None]) -> None:
        self.path = path
        self._show = show
        self._handler = _Handler(path, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8")
        self._splitter = LineSplitter()

    def feed(self, data: bytes) -> None:
        """Add output of the process."""
        self._write(self._splitter.feed(data))

    def finish(self) -> None:
        """Write the last line, after the process's output has ended."""
        self._write(self._splitter.finish())

    def close(self) -> None:
        """Close the file."""
        self._handler.close()

    def _write(self, lines: list[str]) -> None:
        for line in lines:
            self._handler.emit(logging.LogRecord("child", logging.INFO, "", 0, line, None, None))
            if (shown := brief(line)) is not None:
                self._show(shown)
