"""Frame events for WebSockets, once for all sockets that read a session in the same subprotocol."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

import msgspec

from schemas.cursor import Cursor
from services.delivery.formats.format import Address
from services.delivery.formats.tail import Entry
from services.delivery.formats.websocket_messages import Bye, Dialect, Gap

__all__ = [
    "Formats",
    "Outgoing",
    "SessionFormat",
    "frame_message",
    "json_frame",
    "msgpack_frame",
    "packed",
    "position_of",
]

_REFUSALS: Final = (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError, OverflowError)
_pack: Final = msgspec.msgpack.Encoder()


class Outgoing(NamedTuple):
    """ASGI messages of one write, with their number of events and bytes.

    ``position``: `position_of` the last event's cursor, 0 without events.
    """

    messages: list[dict[str, Any]]
    events: int
    size: int
    position: int


def position_of(cursor: str) -> int:
    """Return a number that grows with the cursors of a session.

    Raises:
        InvalidCursor: the text is not a cursor.
    """
    parsed = Cursor.parse(cursor)
    return parsed.seq << 32 | parsed.offset


class _Control(bytes):
    """Frame of a control message, sent separately from events."""


class _Events(msgspec.Struct, tag="events", tag_field="type"):
    session: str
    events: list[msgspec.Raw]


def json_frame(entry: Entry, at: Address) -> bytes:
    """Encode one event with its cursor; the stored bytes are unchanged."""
    return b'{"cursor":"%b","event":%b}' % (at.after(entry), entry.data)


def msgpack_frame(entry: Entry, at: Address) -> bytes:
    """Encode one event with its cursor in MessagePack; binary content as bytes instead of base64.

    An event that MessagePack cannot hold stays stored JSON, in a ``bin``.
    """
    return packed({"cursor": at.after(entry).decode()}, entry.data)


def packed(fields: dict[str, Any], data: bytes) -> bytes:
    """Encode stored data in MessagePack, as ``event`` after the other fields."""
    try:
        event = msgspec.json.decode(data)
        binary = event.get("binary")
        if isinstance(binary, dict) and isinstance(binary.get("data"), str):
            binary["data"] = msgspec.convert(binary["data"], bytes)
        return _pack.encode(fields | {"event": event})
    except _REFUSALS:
        return _pack.encode(fields | {"event": data})


def frame_message(data: bytes, text: bool) -> dict[str, Any]:
    """Return the ASGI message that sends ``data``."""
    if text:
        return {"type": "websocket.send", "text": data.decode("utf-8", "replace")}
    return {"type": "websocket.send", "bytes": data}


def message_size(message: Mapping[str, Any]) -> int:
    """Return the size of an ASGI message's data: bytes, or characters of text."""
    return len(message.get("text") or message.get("bytes") or b"")


class SessionFormat:
    """Encode one session for one WebSocket subprotocol: several events in a message, control messages separate."""

    protocol = "websocket"

    def __init__(self, session: str, dialect: Dialect) -> None:
        self.session = session
        self._dialect = dialect
        self._frame: Callable[[Entry, Address], bytes] = json_frame if dialect.text else msgpack_frame

    def frame(self, entry: Entry, at: Address) -> bytes:
        """Return one event with its cursor."""
        return self._frame(entry, at)

    def message(self, frames: Sequence[bytes], *, ends: bool) -> Outgoing:
        """Return the messages that hold these frames, in their order."""
        messages: list[dict[str, Any]] = []
        waiting: list[bytes] = []
        events, size = 0, 0
        for frame in frames:
            if type(frame) is not _Control:
                waiting.append(frame)
                events += 1
                size += len(frame)
                continue
            self._put(messages, waiting)
            waiting = []
            messages.append(frame_message(bytes(frame), self._dialect.text))
        self._put(messages, waiting)
        newest = next((frame for frame in reversed(frames) if type(frame) is not _Control), None)
        return Outgoing(messages, events, size, 0 if newest is None else position_of(self._cursor(newest)))

    def opening(self, at: Address) -> bytes:
        """Return no bytes: the subscription has been answered already."""
        return b""

    def gap(self, reason: str, generation: str | None, at: Address) -> bytes:
        """Return the message ``gap``."""
        return _Control(self._dialect.encode(Gap(session=at.session, reason=reason, generation=generation)))

    def bye(self, reason: str, seq: int, at: Address) -> bytes:
        """Return the message ``bye``."""
        return _Control(self._dialect.encode(Bye(session=at.session, reason=reason, cursor=at.cursor(seq).decode())))

    def heartbeat(self) -> None:
        """Return None: the socket sends pings itself."""

    def _cursor(self, frame: bytes) -> str:
        """Return the cursor at the beginning of an event's frame."""
        if self._dialect.text:
            return frame[11 : frame.index(b'"', 11)].decode()
        return frame[10 : 10 + frame[9]].decode()

    def _put(self, messages: list[dict[str, Any]], frames: list[bytes]) -> None:
        if not frames:
            return
        if self._dialect.text:
            data = b'{"type":"events","session":"%b","events":[%b]}' % (self.session.encode(), b",".join(frames))
        else:
            data = self._dialect.encode(_Events(self.session, [msgspec.Raw(frame) for frame in frames]))
        messages.append(frame_message(data, self._dialect.text))


class Formats:
    """Share one format object for each session in use, so that its feed frames every event once."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self._formats: WeakValueDictionary[str, SessionFormat] = WeakValueDictionary()

    def of(self, session: str) -> SessionFormat:
        """Return the format of a session."""
        found = self._formats.get(session)
        if found is None:
            found = self._formats[session] = SessionFormat(session, self.dialect)
        return found
