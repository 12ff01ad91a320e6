"""Encode several sessions over one connection: each event carries the name of its session."""

from typing import Any, Final, Protocol

from services.delivery.formats.ndjson import control_line
from services.delivery.formats.sse import RETRY_MS, control_frame

__all__ = ["MULTIPLEX_NDJSON", "MULTIPLEX_SSE", "MultiplexFormat"]


class MultiplexFormat(Protocol):
    """Encode events of several sessions in one wire format."""

    protocol: str
    opening: bytes
    heartbeat: bytes

    def event(self, session: str, cursor: bytes, data: bytes) -> bytes:
        """Return the frame of one event of a session; ``cursor``: the multi-cursor after it."""
        ...

    def gap(self, session: str, reason: str, generation: str | None) -> bytes:
        """Return the frame that reports missing events of a session."""
        ...

    def bye(self, reason: str, cursor: bytes) -> bytes:
        """Return the last frame of the stream."""
        ...


class _ServerSentEvents:
    protocol = "sse-several"
    opening = b"retry: %d\n\n" % RETRY_MS
    heartbeat = b": hb\n\n"

    def event(self, session: str, cursor: bytes, data: bytes) -> bytes:
        return b'id: %b\ndata: {"session":"%b","event":%b}\n\n' % (cursor, session.encode(), data)

    def gap(self, session: str, reason: str, generation: str | None) -> bytes:
        return control_frame("gap", _gap(session, reason, generation))

    def bye(self, reason: str, cursor: bytes) -> bytes:
        return control_frame("bye", {"reason": reason, "cursor": cursor.decode()})


class _NewlineDelimited:
    protocol = "ndjson-several"
    opening = b""
    heartbeat = control_line("heartbeat", {})

    def event(self, session: str, cursor: bytes, data: bytes) -> bytes:
        return b'{"session":"%b","cursor":"%b","event":%b}\n' % (session.encode(), cursor, data)

    def gap(self, session: str, reason: str, generation: str | None) -> bytes:
        return control_line("gap", _gap(session, reason, generation))

    def bye(self, reason: str, cursor: bytes) -> bytes:
        return control_line("bye", {"reason": reason, "cursor": cursor.decode()})


def _gap(session: str, reason: str, generation: str | None) -> dict[str, Any]:
    return {"session": session, "reason": reason} | ({"generation": generation} if generation else {})


MULTIPLEX_SSE: Final[MultiplexFormat] = _ServerSentEvents()
MULTIPLEX_NDJSON: Final[MultiplexFormat] = _NewlineDelimited()
