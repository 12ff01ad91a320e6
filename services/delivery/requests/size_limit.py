"""Compute the size limit of a request from the settings and the broker's limit."""

from typing import Final

from schemas.requests import ENVELOPE
from services.kit.request_head import BodyLimit

__all__ = ["request_limit"]

_LEAST: Final = 1_024


def request_limit(max_body: int, max_payload: int) -> BodyLimit:
    """Return the limit of a request's body and the setting that determines it; ``max_payload``: the broker's."""
    stored = max(_LEAST, max_payload - ENVELOPE)
    if max_body <= stored:
        return BodyLimit(max_body, "TAILRACE_DELIVERY_MAX_BODY")
    return BodyLimit(stored, "max_payload of the broker (nats-server)")
