"""Decode stored messages into records for the fold; malformed bytes give a record with a fault."""

from typing import Final, NamedTuple

from schemas.codec import Header, MalformedEvent, UnknownEvent, decode_event, decode_header
from schemas.events import Event

__all__ = ["Record", "clip", "milliseconds", "read_record"]

TEXT_LIMIT: Final = 200
_LAST_SECOND: Final = 253_402_300_799
"""The end of the year 9999; a stamp beyond is a writer's mistake."""


class Record(NamedTuple):
    """One stored message. ``seq`` is its stream sequence, ``stamp`` when it was stored (nanoseconds; 0: not looked at).

    ``header`` is missing when it is no event at all; ``event`` when the header says enough (a delta) or the rest could
    not be read, and then ``fault`` says why (``unknown`` type, ``malformed``).
    """

    seq: int
    subject: str
    header: Header | None
    event: Event | None = None
    fault: str = ""
    stamp: int = 0


def read_record(seq: int, subject: str, data: bytes, stamp: int = 0) -> Record:
    """Return the record of a stored message. Of a delta only the header is decoded: it carries the running count."""
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
    """Return ``text`` as any database takes it: without NUL, no longer than 200 characters."""
    return text.replace("\0", "")[:TEXT_LIMIT]


def milliseconds(at: float) -> int:
    """Return an event's stamp in whole milliseconds since 1970; 0 for one that is no time at all."""
    return round(at * 1_000) if 0 <= at <= _LAST_SECOND else 0
