"""Compute the position at which a subscriber starts, from its request and the range the log keeps."""

from typing import Literal, NamedTuple

from schemas.cursor import Cursor, CursorIssuer, InvalidCursor
from services.delivery.errors import CursorExpired, CursorForeign

__all__ = ["LIVE", "LATEST", "StartPosition", "check_cursor", "parse_start"]

LATEST: Literal["latest"] = "latest"
LIVE: Literal["live"] = "live"


class StartPosition(NamedTuple):
    """Start after the stream sequence ``after``, or else at ``where``: the session's start, latest answer, or now."""

    after: int | None = None
    where: Literal["start", "latest", "live"] = "latest"


def parse_start(after: str | None, last_event_id: str | None, from_: str | None) -> tuple[str | None, StartPosition]:
    """Return the cursor text and the start to use without a cursor.

    The header wins over the query, since a browser sends it when it reconnects.

    Raises:
        ValueError: ``from_`` is neither ``start`` nor ``live``.
    """
    match from_:
        case None:
            start = StartPosition()
        case "start" | "live":
            start = StartPosition(where=from_)
        case _:
            raise ValueError(f"from={from_[:40]!r} is not one of: start, live")
    return last_event_id or after, start


def check_cursor(text: str, issuer: CursorIssuer, first_seq: int, last_seq: int) -> Cursor:
    """Parse a cursor and check that the log can be read after it.

    ``first_seq`` and ``last_seq``: the range of stream sequences that the stream keeps now.

    Raises:
        CursorForeign: the text is not a cursor, or belongs to another session.
        CursorExpired: the log was re-created, the session moved to another log, or the next events are no longer kept.
    """
    try:
        cursor = Cursor.parse(text)
    except InvalidCursor as error:
        raise CursorForeign(str(error)) from error
    if cursor.session != issuer.session:
        raise CursorForeign(f"cursor {text!r} belongs to another session")
    if cursor.partition != issuer.partition:
        raise CursorExpired("the session has moved to another log since nothing of it was kept any more")
    if cursor.incarnation != issuer.incarnation:
        raise CursorExpired("the log was re-created since this cursor was issued")
    if cursor.seq + (cursor.offset > 0) > last_seq:
        raise CursorExpired("the log ends before this cursor: it was restored or truncated")
    if cursor.seq and cursor.seq + 1 < first_seq:
        raise CursorExpired("what followed this cursor is no longer kept")
    return cursor
