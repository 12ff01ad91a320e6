"""Bounds of written events: each stays below the broker's message limit and within the limits of all readers."""

from collections.abc import Iterator
from typing import Any, Final, TypeVar

import msgspec

from schemas.usage import MAX_NUMBER, Usage

__all__ = [
    "CHOICES",
    "EVENT_BYTES",
    "JSON_BYTES",
    "JSON_DEPTH",
    "MESSAGE_CHARS",
    "NAME_CHARS",
    "PIECE_BYTES",
    "PIECE_CHARS",
    "REASON_CHARS",
    "choice_of",
    "fits",
    "number",
    "pieces",
    "usable",
]

EVENT_BYTES: Final = 1024 * 1024
"""Largest event of an answer, in bytes as stored; a common message limit of WebSocket clients."""
PIECE_CHARS: Final = 96 * 1024
"""Longer text is split: a character takes up to 6 bytes in JSON."""
PIECE_BYTES: Final = 384 * 1024
"""Larger binary content is split; a multiple of 3, so that the pieces' base64 can be joined as text too."""
JSON_BYTES: Final = 512 * 1024
"""Larger objects of a provider (an annotation, a signature, something extra) are left out with a notice."""
JSON_DEPTH: Final = 64
CHOICES: Final = 1_000
"""Number of alternative answers that are distinguished; a higher index is invalid."""
REASON_CHARS: Final = 100
"""Characters of a finish reason, one for each choice."""
NAME_CHARS: Final = 1_024
"""Identifiers, kinds, media types and the like that are longer are cut."""
MESSAGE_CHARS: Final = 8_192
"""Messages for people that are longer are cut."""

_T = TypeVar("_T", str, bytes)


def number(value: object) -> int | None:
    """Return a count or an index in the log's range (0 to 2^53 - 1), or ``None`` for anything else. ``10.0`` is 10."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER:
        return value
    return None


def choice_of(index: object) -> int:
    """Return the index of an alternative answer; 0 for an invalid one."""
    position = index if type(index) is int else number(index)
    return position if position is not None and 0 <= position < CHOICES else 0


def pieces(value: _T, size: int) -> Iterator[_T]:
    """Yield ``value`` in pieces of at most ``size``; an empty value is one piece."""
    if len(value) <= size:
        yield value
        return
    for at in range(0, len(value), size):
        yield value[at : at + size]


def fits(value: Any) -> bool:
    """Return whether a JSON value can be stored: at most `JSON_BYTES` long and `JSON_DEPTH` deep."""
    level: list[Any] = [value]
    for _ in range(JSON_DEPTH):
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        if not level:
            break
    if level:
        return False
    try:
        return len(msgspec.json.encode(value)) <= JSON_BYTES
    except UnicodeEncodeError:
        return len(str(value)) * 6 <= JSON_BYTES
    except (TypeError, OverflowError):
        return False


def usable(usage: Usage) -> Usage | None:
    """Return ``usage``, without ``raw`` if that is too large, or ``None`` if a number is out of bounds."""
    if usage.raw is not None and not fits(usage.raw):
        usage = msgspec.structs.replace(usage, raw=None)
    required = (
        usage.input,
        usage.output,
        usage.cached_input,
        usage.cache_write,
        usage.cache_write_1h,
        usage.reasoning,
    )
    billed = (usage.billed_input, usage.billed_output)
    good = all(number(n) is not None for n in required) and all(n is None or number(n) is not None for n in billed)
    return usage if good else None
