"""Cursors: opaque positions in a session, issued by the log.

A cursor contains the stream's incarnation (to detect a re-created stream), the session (to detect a cursor of another
session) and the stream sequence *after* which reading continues. Cursors of one session and incarnation sort as text in
the order of the log. They are opaque to clients.

When text is sent in other pieces than it is stored in, a cursor may lie inside a delta: it then has an offset, the
number of characters already sent of the event *after* its stream sequence.
"""

import hashlib
import re
from typing import Final, NamedTuple

__all__ = ["Cursor", "CursorIssuer", "InvalidCursor", "session_mark"]

_SHAPE: Final = re.compile(r"t1([0-9a-f]{2})([0-9a-f]{8})([0-9a-f]{8})([0-9a-f]{12})(?:\.([0-9a-f]{8}))?")


class InvalidCursor(ValueError):
    """Text that is not a Tailrace cursor."""

    def __init__(self, text: str) -> None:
        super().__init__(f"cursor {text[:60]!r} is not one that this service issues")


class Cursor(NamedTuple):
    """A parsed cursor.

    ``seq``: stream sequence of the last event received in full. ``offset``: characters received of the event with the
    next stream sequence.
    """

    partition: int
    incarnation: str
    session: str
    seq: int
    offset: int = 0

    @classmethod
    def parse(cls, text: str) -> "Cursor":
        """Parse a cursor.

        Raises:
            InvalidCursor: ``text`` is not a cursor.
        """
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise InvalidCursor(text)
        partition, incarnation, session, seq, offset = match.groups()
        return cls(int(partition, 16), incarnation, session, int(seq, 16), int(offset or "0", 16))

    @property
    def text(self) -> str:
        """Return the cursor as text for clients."""
        within = f".{self.offset:08x}" if self.offset else ""
        return f"t1{self.partition:02x}{self.incarnation}{self.session}{self.seq:012x}{within}"


def session_mark(tenant: str, session: str) -> str:
    """Return the hash that identifies a session in its cursors: 8 hexadecimal digits."""
    return hashlib.sha256(f"{tenant}.{session}".encode()).hexdigest()[:8]


class CursorIssuer:
    """Issue the cursors of one session in one incarnation of its stream.

    ``created``: the stream's creation time as the broker prints it, which changes when the stream is re-created.
    ``partition``: 0 to 255.
    """

    __slots__ = ("incarnation", "partition", "prefix", "session")

    def __init__(self, partition: int, created: str, tenant: str, session: str) -> None:
        if not 0 <= partition <= 0xFF:
            raise ValueError(f"partition {partition} does not fit into a cursor: use 0 to 255")
        self.partition = partition
        self.incarnation = hashlib.sha256(created.encode()).hexdigest()[:8]
        self.session = session_mark(tenant, session)
        self.prefix = f"t1{partition:02x}{self.incarnation}{self.session}"

    def issue(self, seq: int) -> str:
        """Return the cursor after the event with this stream sequence (0: before the first event)."""
        return f"{self.prefix}{seq:012x}"
