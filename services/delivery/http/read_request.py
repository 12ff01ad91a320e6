"""Parse a request for events from its query, or from the JSON body of a POST."""

from typing import Any, Final

import msgspec

from services.delivery.fanout.streams import ReadOptions
from services.delivery.http.query import parse_query
from services.kit.problem import Problem

__all__ = ["COMPLETE", "ReadRequest", "parse_read_request", "read_options_of"]

COMPLETE: Final = "complete"
_NAMES: Final = ("after", "from", "generation", "granularity", "coalesce", "wait", "limit")


class ReadRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """A request for the events of one or several sessions. ``wait``: seconds, or ``complete``."""

    after: str | None = None
    from_: str | None = None
    generation: str | None = None
    granularity: str | None = None
    coalesce: int | None = None
    wait: float | str | None = None
    limit: int | None = None
    sessions: list[str] = []

    @property
    def seconds(self) -> float | None:
        """The longest wait in seconds; ``None``: unbounded.

        Raises:
            Problem: 400, ``wait`` is not a number of seconds.
        """
        if self.wait is None or self.wait == COMPLETE:
            return None
        try:
            seconds = float(self.wait)
        except ValueError:
            seconds = -1.0
        if not seconds >= 0:
            raise Problem(400, f"wait={str(self.wait)[:40]!r} is neither a number of seconds nor {COMPLETE!r}")
        return seconds


def parse_read_request(scope: Any, body: bytes | None = None, *, several: bool = False) -> ReadRequest:
    """Parse a request from its ``body``, or from its query without one.

    ``several``: the request may name its sessions.

    Raises:
        Problem: 400, a field is not valid.
    """
    try:
        ask = _of_query(scope, several) if body is None else _of_body(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, str(error) or "the body is not readable as JSON") from error
    if ask.sessions and not several:
        raise Problem(400, "the path names the session: send 'sessions' only to /v1/events")
    return ask


def read_options_of(scope: Any, ask: ReadRequest, session: str) -> ReadOptions:
    """Return the read options of a request for one session.

    Raises:
        Problem: 400, a field is not valid.
    """
    return ReadOptions.read(
        session,
        generation=ask.generation,
        after=ask.after,
        last_event_id=last_event_id(scope),
        from_=ask.from_,
        granularity=ask.granularity,
        coalesce=ask.coalesce,
    )


def last_event_id(scope: Any) -> str | None:
    """Return the ``Last-Event-ID`` header: the last event id that a browser has received."""
    return header(scope, b"last-event-id")


def header(scope: Any, name: bytes) -> str | None:
    """Return a header's values joined by commas, or None when it is missing or empty."""
    found = [value.decode("latin-1") for key, value in scope["headers"] if key == name]
    return ", ".join(found) or None


def _of_query(scope: Any, several: bool) -> ReadRequest:
    single, sessions = parse_query(scope, _NAMES, repeated="session" if several else None)
    return msgspec.convert({**single, "sessions": sessions}, ReadRequest, strict=False)


def _of_body(body: bytes) -> ReadRequest:
    return msgspec.json.decode(body, type=ReadRequest) if body.strip() else ReadRequest()
