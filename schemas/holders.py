"""Question of a producer, on redelivery of a request, whether the producer that claimed it still runs it."""

from typing import Final

__all__ = ["HELD", "asked_claim", "holder_question"]

HELD: Final = b"held"
"""Answer of the producer that holds the claim and still runs the request. No other producer answers."""


def holder_question(claim: int) -> bytes:
    """Return the question for the holder of a claim; ``claim``: stream sequence of the claim's record."""
    return b"%d" % claim


def asked_claim(question: bytes) -> int | None:
    """Return the claim in a question, or ``None`` for any other message."""
    return int(question) if question.isdigit() else None
