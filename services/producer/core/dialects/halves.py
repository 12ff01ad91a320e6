"""Join halves of surrogate pairs that a provider has split over two events."""

from typing import Final, Literal

__all__ = ["Halves", "Lane"]

Lane = tuple[type, int, int]
"""Kind of text, choice, and index of the tool call."""
_ALONE: Final = "\ufffd"


class Halves:
    """Hold the half at the end of a text until the next text of the same lane; a lone half becomes U+FFFD.

    At most one character per lane is held.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: dict[Lane, str] = {}

    def mended(self, lane: Lane, text: str) -> str:
        """Prepend the held half to ``text`` and hold back a half at its end; return the result, maybe empty."""
        if not text:
            return text
        held = self._held.pop(lane, "")
        first = _half(text[0])
        if held and first == "low":
            text = chr(0x10000 + ((ord(held) - 0xD800) << 10) + (ord(text[0]) - 0xDC00)) + text[1:]
        elif held:
            text = _ALONE + text
        elif first == "low":
            text = _ALONE + text[1:]
        if _half(text[-1]) == "high":
            self._held[lane] = text[-1]
            text = text[:-1]
        return text

    def left(self) -> list[tuple[Lane, str]]:
        """Return replacement characters for the halves still held, and drop these."""
        lanes = list(self._held)
        self._held.clear()
        return [(lane, _ALONE) for lane in lanes]


def _half(character: str) -> Literal["high", "low"] | None:
    if "\ud800" <= character <= "\udbff":
        return "high"
    return "low" if "\udc00" <= character <= "\udfff" else None
