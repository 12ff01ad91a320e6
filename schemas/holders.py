"""Who runs a request: asked by a producer that is given one which another producer has begun."""

from typing import Final

__all__ = ["HELD", "asked_claim", "holder_question"]

HELD: Final = b"held"
"""The answer of the producer that has begun it and goes on with it. Nobody else answers."""


def holder_question(claim: int) -> bytes:
    """Return the question who has begun a request; ``claim``: stream sequence of the record that says so."""
    return b"%d" % claim


def asked_claim(question: bytes) -> int | None:
    """Return the claim that a question names; ``None`` for anything else."""
    return int(question) if question.isdigit() else None
