"""Decode stored messages into records for the fold; malformed messages become records with a fault."""

from typing import Final, NamedTuple

from schemas.codec import Header, MalformedEvent, UnknownEvent, decode_event, decode_header
from schemas.events import Event

__all__ = ["Record", "clip", "milliseconds", "read_record"]

TEXT_LIMIT: Final = 200
_LAST_SECOND: Final = 253_402_300_799
"""The end of the year 9999; a later stamp is a writer's error."""


class Record(NamedTuple):
    """One stored message. ``seq``: its stream sequence; ``stamp``: its storage time (nanoseconds; 0 if not read).

    ``header`` is None if the message is not an event. ``event`` is None if the header is enough (a delta) or the body
    could not be decoded; ``fault`` then names the reason (``unknown`` type, ``malformed``).
    """

    seq: int
    subject: str
    header: Header | None
    event: Event | None = None
    fault: str = ""
    stamp: int = 0


def read_record(seq: int, subject: str, data: bytes, stamp: int = 0) -> Record:
    """Decode a stored message. Only the header of a delta is decoded: it carries the running count."""
    try:
        header = decode_header(data)
        if header.type == "delta":
            return Record(seq, subject, header, stamp=stamp)
        return Record(seq, subject, header, decode_event(data), stamp=stamp)
    except UnknownEvent as error:
        return Record(seq, subject, error.header, None, "unknown", stamp)
    except MalformedEvent as error:
        return Record(seq, subject, error.header, None, "malformed", stamp)


def clip(text: str) -> str:
    """Return ``text`` without NUL and cut to 200 characters, as any database accepts it."""
    return text.replace("\0", "")[:TEXT_LIMIT]


def milliseconds(at: float) -> int:
    """Convert an event's stamp to whole milliseconds since 1970; 0 if it is not a valid time."""
    return round(at * 1_000) if 0 <= at <= _LAST_SECOND else 0
