"""The published events: natural words, each after a mark by which it can be counted without parsing."""

from typing import Final

from bench.text import token
from schemas.codec import encode_event
from schemas.events import Completed, Delta, Started

__all__ = ["MARK", "TEXT_MARK", "closing", "event", "generation", "opening", "session", "text"]

TEXT_MARK: Final = "☕"
MARK: Final = TEXT_MARK.encode()[:1]
"""A byte that occurs once in every event and nowhere else in a stream, which is ASCII otherwise."""


def session(number: int) -> str:
    """Return the name of a session."""
    return f"fan-{number}"


def generation(number: int) -> str:
    """Return the name of a session's only generation."""
    return f"gen_fan{number}"


def text(number: int, index: int) -> str:
    """Return the text of event ``index`` (0, 1 …) of session ``number``."""
    return TEXT_MARK + token(number, index).encode("ascii", "ignore").decode()


def opening(number: int, at: float) -> bytes:
    """Return the first record of a session's generation."""
    return encode_event(
        Started(generation=generation(number), seq=0, at=at, model="bench/fan", provider="bench", upstream_model="fan")
    )


def event(number: int, index: int, at: float) -> bytes:
    """Return one event as stored, and as published to peers."""
    made = Delta(generation=generation(number), seq=index + 1, at=at, text=text(number, index), tokens=index + 1)
    return encode_event(made)


def closing(number: int, events: int, at: float) -> bytes:
    """Return the terminal of a session's generation."""
    return encode_event(Completed(generation=generation(number), seq=events + 1, at=at, finish_reason="stop"))
