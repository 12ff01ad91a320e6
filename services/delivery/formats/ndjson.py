"""Frame events as newline-delimited JSON: one line for each event, with its cursor."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from services.delivery.formats.format import Address
from services.delivery.formats.sse import http_body
from services.delivery.formats.tail import Entry

__all__ = ["NDJSON", "NewlineDelimited", "control_line"]


def control_line(type_: str, fields: dict[str, Any]) -> bytes:
    """Return a control line, which has a ``type`` and no ``event``."""
    return msgspec.json.encode({"type": type_} | fields) + b"\n"


class NewlineDelimited:
    """Encode an event as ``{"cursor", "event"}`` with the stored bytes; control lines have a ``type`` instead."""

    protocol = "ndjson"

    def frame(self, entry: Entry, at: Address) -> bytes:
        """Return the line of one event. Stored events are single-line JSON."""
        return b'{"cursor":"%b","event":%b}\n' % (at.after(entry), entry.data)

    def message(self, frames: Sequence[bytes], *, ends: bool) -> dict[str, Any]:
        """Return the body message that holds these lines."""
        return http_body(b"".join(frames), more=not ends)

    def opening(self, at: Address) -> bytes:
        """Return no bytes."""
        return b""

    def gap(self, reason: str, generation: str | None, at: Address) -> bytes:
        """Return the control line ``gap``."""
        return control_line("gap", {"reason": reason} | ({"generation": generation} if generation else {}))

    def bye(self, reason: str, seq: int, at: Address) -> bytes:
        """Return the control line ``bye``."""
        return control_line("bye", {"reason": reason, "cursor": at.cursor(seq).decode()})

    def heartbeat(self) -> dict[str, Any]:
        """Return the control line ``heartbeat``."""
        return http_body(control_line("heartbeat", {}))


NDJSON: Final = NewlineDelimited()
