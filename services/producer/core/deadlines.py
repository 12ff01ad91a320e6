"""Deadlines of the phases of a call."""

from typing import Literal

import msgspec

from schemas.requests import RequestDeadlines
from services.producer.core.registry import DeadlineOverrides

__all__ = ["Deadlines", "Phase", "overdue"]

Phase = Literal["queued", "connecting", "waiting", "streaming"]


class Deadlines(msgspec.Struct, frozen=True, kw_only=True):
    """All in seconds. ``first_token`` counts from the call, ``total`` from the start of the generation."""

    connect: float = 10.0
    first_token: float = 30.0
    between_tokens: float = 30.0
    total: float = 900.0

    def overridden(self, own: DeadlineOverrides | RequestDeadlines) -> "Deadlines":
        """Return these deadlines with a model's or a request's own in their place."""
        changes = {f: getattr(own, f) for f in own.__struct_fields__ if getattr(own, f) is not None}
        return msgspec.structs.replace(self, **changes)


def overdue(deadlines: Deadlines, phase: Phase, *, now: float, begun: float, called: float, token: float) -> str | None:
    """Return the code of the deadline that has passed at ``now``, or ``None``.

    ``begun``, ``called`` and ``token``: times of the generation's start, the call and the last token, on the clock of
    ``now``.
    """
    if now - begun > deadlines.total:
        return "deadline_total"
    if phase == "queued":
        return None
    if phase == "connecting" and now - called > deadlines.connect:
        return "deadline_connect"
    if phase != "streaming" and now - called > deadlines.first_token:
        return "deadline_first_token"
    if phase == "streaming" and now - token > deadlines.between_tokens:
        return "deadline_between_tokens"
    return None
