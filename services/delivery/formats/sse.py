"""Frame events as server-sent events (WHATWG HTML, section 9.2)."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from services.delivery.formats.format import Address
from services.delivery.formats.tail import Entry

__all__ = ["HEADERS", "RETRY_MS", "SSE", "ServerSentEvents", "control_frame", "http_body"]

RETRY_MS: Final = 1_000
_HEARTBEAT: Final = b": hb\n\n"
HEADERS: Final[tuple[tuple[bytes, bytes], ...]] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)


def http_body(data: bytes, *, more: bool = True) -> dict[str, Any]:
    """Return the ASGI message that sends a piece of an HTTP body."""
    return {"type": "http.response.body", "body": data, "more_body": more}


def control_frame(name: str, fields: dict[str, Any]) -> bytes:
    """Return a named event without ``id``, which does not change the client's position."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(fields))


class ServerSentEvents:
    """Encode an event with its cursor as ``id`` and the stored bytes as ``data``; control events have a name."""

    protocol = "sse"

    def frame(self, entry: Entry, at: Address) -> bytes:
        """Return the frame of one event. Stored events are single-line JSON: no line needs splitting."""
        if entry.offset:
            return b"id: %b\ndata: %b\n\n" % (at.after(entry), entry.data)
        return b"id: %b%012x\ndata: %b\n\n" % (at.prefix, entry.seq, entry.data)

    def message(self, frames: Sequence[bytes], *, ends: bool) -> dict[str, Any]:
        """Return the body message that holds these frames."""
        data = frames[0] if len(frames) == 1 else b"".join(frames)
        return {"type": "http.response.body", "body": data, "more_body": not ends}

    def opening(self, at: Address) -> bytes:
        """Return the field ``retry``: milliseconds that a browser waits before it reconnects."""
        return b"retry: %d\n\n" % RETRY_MS

    def gap(self, reason: str, generation: str | None, at: Address) -> bytes:
        """Return the named event ``gap``."""
        return control_frame("gap", {"reason": reason} | ({"generation": generation} if generation else {}))

    def bye(self, reason: str, seq: int, at: Address) -> bytes:
        """Return the named event ``bye``."""
        return control_frame("bye", {"reason": reason, "cursor": at.cursor(seq).decode()})

    def heartbeat(self) -> dict[str, Any]:
        """Return a comment line, which clients ignore."""
        return http_body(_HEARTBEAT)


SSE: Final = ServerSentEvents()
