"""Negotiate the content type from the header ``Accept`` (RFC 9110, section 12.5.1)."""

from collections.abc import Sequence

__all__ = ["negotiate"]

_LIMIT = 50  # ranges of one header that are parsed


def negotiate(accept: str | None, offered: Sequence[str]) -> str | None:
    """Return the offered media type with the highest quality, the first among equals; ``None`` if none is accepted.

    Parameters other than the quality are ignored. Without a header every type is accepted.
    """
    if accept is None or not accept.strip():
        return offered[0]
    ranges = [_range(text) for text in accept.split(",")[:_LIMIT] if text.strip()]
    best, quality = None, 0.0
    for media_type in offered:
        found = max((r for r in ranges if _covers(r[0], media_type)), key=lambda r: _weight(r[0]), default=None)
        if found is not None and found[1] > quality:
            best, quality = media_type, found[1]
    return best


def _range(text: str) -> tuple[str, float]:
    name, *parameters = (part.strip().lower() for part in text.split(";"))
    quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
    try:
        return name, min(1.0, max(0.0, float(quality)))
    except ValueError:
        return name, 0.0


def _covers(range_: str, media_type: str) -> bool:
    if range_ in ("*/*", "*", media_type):
        return True
    return range_.endswith("/*") and media_type.startswith(range_[:-1])


def _weight(range_: str) -> int:
    """Return the specificity of a range; the most specific range that covers a type decides."""
    return 0 if range_ in ("*/*", "*") else 1 if range_.endswith("/*") else 2
