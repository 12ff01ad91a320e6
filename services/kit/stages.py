"""Measure the stages of a start, from its request to its first token."""

from typing import Final

from prometheus_client import Histogram

__all__ = ["STAGES", "stage"]

STAGES: Final = ("admitted", "noted", "queued", "taken", "begun", "answered", "appended", "heard")
"""In order; each is measured by one service, and two compare the clocks of two machines (*).

``admitted``: checks and limits (delivery). ``noted``: the record is stored and the session's end is known.
``queued``: the queue has stored the request. ``taken`` (*): from the request's time to a producer. ``begun``: the log
has stored the first event. ``answered``: from the provider's call to its first token. ``appended``: the log has stored
that token. ``heard`` (*): from the first event's time to its arrival at delivery.
"""
_SECONDS: Final = Histogram(
    "tailrace_first_token_stage_seconds",
    "Time of each stage of a start, from its request to its first token",
    ["stage"],
    buckets=(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)


def stage(name: str) -> Histogram:
    """Return the histogram of one of `STAGES`, in seconds.

    Raises:
        ValueError: there is no such stage.
    """
    if name not in STAGES:
        raise ValueError(f"{name!r} is not one of: {', '.join(STAGES)}")
    return _SECONDS.labels(name)
