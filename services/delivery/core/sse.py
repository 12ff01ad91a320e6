"""Framing for server-sent events (WHATWG HTML, section 9.2)."""

from typing import Any, Final

import msgspec

from services.delivery.core.entries import Entry

__all__ = ["HEADERS", "HEARTBEAT", "control_frame", "frame", "gap_frame", "retry_frame"]

HEARTBEAT: Final = b": hb\n\n"
HEADERS: Final[tuple[tuple[bytes, bytes], ...]] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)


def frame(entry: Entry, prefix: bytes) -> bytes:
    """Return the frame of one event: its cursor as ``id``, the stored bytes as ``data``.

    ``prefix`` is the cursor without its stream sequence. Stored events are single-line JSON: no line needs splitting.
    """
    return b"id: %b%012x\ndata: %b\n\n" % (prefix, entry.seq, entry.data)


def control_frame(name: str, fields: dict[str, Any]) -> bytes:
    """Return a named event without ``id``: it moves no client's position."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(fields))


def gap_frame(reason: str, generation: str | None = None) -> bytes:
    """Return the frame that says out loud that something is missing, and of what."""
    return control_frame("gap", {"reason": reason} | ({"generation": generation} if generation else {}))


def retry_frame(milliseconds: int) -> bytes:
    """Return the frame that tells a browser how long to wait before it reconnects."""
    return b"retry: %d\n\n" % milliseconds
