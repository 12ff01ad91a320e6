"""Pack the positions in several sessions into one cursor."""

import base64
import binascii
from collections.abc import Sequence
from typing import Final

from schemas.cursor import Cursor, InvalidCursor
from services.delivery.formats.granularity import Position

__all__ = ["MAX_SESSIONS", "MultiCursor", "parse_multi_cursor"]

MAX_SESSIONS: Final = 32
_MARK: Final = "m1"
_MAX_TEXT: Final = 1_400  # more than `MAX_SESSIONS` cursors can need; far less than servers take in a header
_NUMBER_BYTES: Final = 8


class MultiCursor:
    """Track the positions of a connection's sessions, one cursor each, in a fixed order."""

    def __init__(self, cursors: Sequence[Cursor]) -> None:
        self._order = sorted(range(len(cursors)), key=lambda n: cursors[n][:2])  # sessions of one log are adjacent
        self._heads = [_head(cursor) for cursor in cursors]
        self._marks = [bytes.fromhex(cursor.session) for cursor in cursors]
        self._records = [b""] * len(cursors)
        for index, cursor in enumerate(cursors):
            self.advance(index, Position(cursor.seq, cursor.offset))

    def advance(self, index: int, position: Position) -> None:
        """Set the position in one session."""
        self._records[index] = self._marks[index] + _number(position.seq) + _number(position.offset)

    def text(self) -> bytes:
        """Return the multi-cursor text."""
        parts: list[bytes] = []
        last = b""
        for index in self._order:
            head = self._heads[index]
            parts += [b"\1" + head if head != last else b"\0", self._records[index]]
            last = head
        return _MARK.encode() + base64.urlsafe_b64encode(b"".join(parts)).rstrip(b"=")


def parse_multi_cursor(text: str) -> list[Cursor]:
    """Parse a multi-cursor, or a cursor of a single session, into its cursors.

    Raises:
        InvalidCursor: the text is neither.
    """
    if not text.startswith(_MARK):
        return [Cursor.parse(text)]
    if len(text) > _MAX_TEXT:
        raise InvalidCursor(text)
    try:
        packed = base64.b64decode(text[len(_MARK) :] + "=" * (-(len(text) - len(_MARK)) % 4), b"-_", validate=True)
        return _unpack(packed)
    except (ValueError, IndexError, binascii.Error) as error:
        raise InvalidCursor(text) from error


def _unpack(packed: bytes) -> list[Cursor]:
    found: list[Cursor] = []
    at, head = 0, b""
    while at < len(packed):
        fresh, at = packed[at], at + 1
        if fresh:
            head, at = packed[at : at + 5], at + 5
        mark, at = packed[at : at + 4], at + 4
        seq, at = _read_number(packed, at)
        offset, at = _read_number(packed, at)
        if fresh > 1 or len(head) != 5 or len(mark) != 4:
            raise ValueError("not a composite cursor")
        found.append(Cursor(head[0], head[1:].hex(), mark.hex(), seq, offset))
    if not 0 < len(found) <= MAX_SESSIONS:
        raise ValueError("not a composite cursor")
    return found


def _head(cursor: Cursor) -> bytes:
    return bytes([cursor.partition]) + bytes.fromhex(cursor.incarnation)


def _number(value: int) -> bytes:
    """Encode a number as a varint: groups of seven bits, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_number(packed: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(_NUMBER_BYTES):
        byte = packed[at + shift]
        value |= (byte & 0x7F) << (7 * shift)
        if byte <= 0x7F:
            return value, at + shift + 1
    raise ValueError("a number is too long")
