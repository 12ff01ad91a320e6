"""What a running generation can be told and asked on its control subject; the producer answers `HEARD`, or `OVER`."""

from typing import Final

__all__ = ["CANCEL", "HEARD", "HELD", "OVER", "OVER_BUDGET", "asked_claim", "holder_question"]

CANCEL: Final = b"cancel"
"""Somebody who may wants it to end: it ends as ``cancelled``."""

OVER_BUDGET: Final = b"budget_exceeded"
"""A hard limit of whoever pays is reached: it ends as ``failed`` with the code ``budget_exceeded``."""

HEARD: Final = b"ok"

OVER: Final = b"over"
"""It had just ended."""

HELD: Final = b"held"
"""Answer to a `holder_question`: the producer that has begun it goes on with it."""

_HOLDER: Final = b"holder "


def holder_question(claim: int) -> bytes:
    """Return the question of a producer that was given a request which another one has begun.

    ``claim``: stream sequence of the record that says so. Only the producer that wrote it answers with `HELD`.
    """
    return _HOLDER + b"%d" % claim


def asked_claim(data: bytes) -> int | None:
    """Return which claim a `holder_question` is about; ``None`` for any other message."""
    number = data.removeprefix(_HOLDER)
    return int(number) if data.startswith(_HOLDER) and number.isdigit() else None
