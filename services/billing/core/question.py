"""Parse the query parameters of usage queries, and encode page cursors."""

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Final

import msgspec

from services.billing.core.generation import STATUSES
from services.billing.core.spending import DAY

__all__ = [
    "DIMENSIONS",
    "LABEL",
    "BadQuestion",
    "Filters",
    "PageKey",
    "is_summed",
    "parse_group_by",
    "parse_label",
    "parse_moment",
    "parse_page",
    "parse_status",
    "render_bucket",
    "write_page",
]

DIMENSIONS: Final = ("tenant", "session", "model", "provider", "key", "status", "month", "day", "hour")
BUCKETS: Final = {"month": 0, "day": 86_400_000, "hour": 3_600_000}
"""The time dimensions and their width in milliseconds; 0 for months."""
LABEL: Final = "label:"
"""Prefix of a label's name in a dimension or a filter."""
_LABEL_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SUMMED: Final = frozenset({"tenant", "model", "provider", "key", "status", "month", "day"})
PageKey = tuple[str | int, ...]


class BadQuestion(ValueError):
    """An invalid query parameter; the text names it and what would be right."""


class Filters(msgspec.Struct, frozen=True, kw_only=True):
    """The filters of a usage query. ``start`` (inclusive) and ``end`` (exclusive) bound ``started_at``, in its unit.

    ``key`` names the credential; ``label``: name and value of one of the request's labels.
    """

    start: int | None = None
    end: int | None = None
    tenant: str | None = None
    model: str | None = None
    provider: str | None = None
    status: str | None = None
    session: str | None = None
    key: str | None = None
    pricing: str | None = None
    label: tuple[str, str] | None = None

    def exact(self) -> list[tuple[str, str]]:
        """Return the columns that must equal a value, with that value."""
        names = ("tenant", "model", "provider", "status", "session", "key")
        return [(name, value) for name in names if (value := getattr(self, name)) is not None]


def is_summed(filters: Filters, group_by: Sequence[str]) -> bool:
    """Return whether the daily sums can answer a query: bounds are whole days, filters and groups are no finer."""
    bounds = [moment for moment in (filters.start, filters.end) if moment is not None]
    finer = filters.session is not None or filters.label is not None or filters.pricing is not None
    return not finer and _SUMMED.issuperset(group_by) and all(moment % DAY == 0 for moment in bounds)


def parse_label(text: str | None) -> tuple[str, str] | None:
    """Parse a label filter written as ``name=value``.

    Raises:
        BadQuestion: it has another form.
    """
    if text is None:
        return None
    name, separator, value = text.partition("=")
    if not separator or _LABEL_NAME.fullmatch(name) is None:
        raise BadQuestion(f"label: {text[:40]!r} is not name=value, with a name of letters, digits and _.-")
    return name, value


def parse_moment(name: str, text: str | None) -> int | None:
    """Convert a date (its midnight, UTC) or an RFC 3339 time to milliseconds since 1970.

    Raises:
        BadQuestion: it is neither.
    """
    if text is None:
        return None
    try:
        if len(text) == 10:
            day = date.fromisoformat(text)
            return _milliseconds(datetime(day.year, day.month, day.day, tzinfo=UTC))
        # An unescaped '+' in a query arrives as a space.
        moment = datetime.fromisoformat(text[:-6] + "+" + text[-5:] if text[-6:-5] == " " else text)
        if moment.tzinfo is None or len(text) < 11 or text[10] not in "Tt ":
            raise ValueError("no offset")
        return _milliseconds(moment)
    except (ValueError, OverflowError) as error:
        raise BadQuestion(
            f"{name}: {text[:40]!r} is neither a date (2026-01-31) nor an RFC 3339 time (2026-01-31T12:00:00Z)"
        ) from error


def _milliseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1_000)


def parse_group_by(values: Sequence[str] | None) -> tuple[str, ...]:
    """Parse one or several ``group_by`` parameters, each of which may be a list separated by commas.

    Raises:
        BadQuestion: a dimension is unknown or repeated.
    """
    names = tuple(part.strip() for value in values or () for part in value.split(",") if part.strip())
    for name in names:
        if name.startswith(LABEL) and _LABEL_NAME.fullmatch(name.removeprefix(LABEL)):
            continue
        if name not in DIMENSIONS:
            raise BadQuestion(f"group_by: {name[:40]!r} is not one of {', '.join(DIMENSIONS)}, label:<name>")
    if len(set(names)) != len(names):
        raise BadQuestion("group_by: a dimension is repeated")
    return names


def parse_status(text: str | None) -> str | None:
    """Return ``text`` if it is a known status or None.

    Raises:
        BadQuestion: there is no such status.
    """
    if text is not None and text not in STATUSES:
        raise BadQuestion(f"status: {text[:40]!r} is not one of {', '.join(STATUSES)}")
    return text


def write_page(question: object, key: PageKey) -> str:
    """Encode ``key`` as the opaque cursor of the next page of ``question`` (any stable value)."""
    return base64.urlsafe_b64encode(msgspec.json.encode([_digest(question), *key])).decode().rstrip("=")


def parse_page(question: object, text: str | None, types: Sequence[type]) -> PageKey | None:
    """Decode a cursor to the key after which the page begins; ``None`` for the first page.

    Raises:
        BadQuestion: it is not a cursor, or belongs to another query.
    """
    if text is None:
        return None
    try:
        values = msgspec.json.decode(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
        digest, *key = values
    except (ValueError, TypeError, binascii.Error) as error:
        raise BadQuestion("cursor: it is not one that this service issues") from error
    if digest != _digest(question):
        raise BadQuestion("cursor: it belongs to another query; keep the other parameters unchanged")
    if len(key) != len(types) or not all(_fits(v, t) for v, t in zip(key, types, strict=True)):
        raise BadQuestion("cursor: it is not one that this service issues")
    return tuple(key)


def _fits(value: object, type_: type) -> bool:
    if isinstance(value, str):
        return type_ is str and "\0" not in value
    return type_ is int and type(value) is int and abs(value) < 2**62


def _digest(question: object) -> str:
    return hashlib.sha256(repr(question).encode()).hexdigest()[:12]


def render_bucket(dimension: str, bucket: int) -> str:
    """Format the number of a month since the year 0 (``2026-01``), or of a day (``2026-01-31``) or an hour
    (``2026-01-31T12:00:00Z``) since 1970.
    """
    if dimension == "month":
        return f"{bucket // 12:04d}-{bucket % 12 + 1:02d}"
    moment = datetime.fromtimestamp(bucket * BUCKETS[dimension] / 1_000, UTC)
    return moment.strftime("%Y-%m-%d" if dimension == "day" else "%Y-%m-%dT%H:00:00Z")
