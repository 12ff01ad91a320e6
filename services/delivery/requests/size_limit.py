"""How large a request may be: what the settings allow and the broker can store."""

from typing import Final

from schemas.requests import ENVELOPE
from services.kit.request_head import BodyLimit

__all__ = ["request_limit"]

_LEAST: Final = 1_024


def request_limit(max_body: int, max_payload: int) -> BodyLimit:
    """Return the limit of a request's body with the setting that holds it down; ``max_payload``: the broker's."""
    stored = max(_LEAST, max_payload - ENVELOPE)
    if max_body <= stored:
        return BodyLimit(max_body, "TAILRACE_DELIVERY_MAX_BODY")
    return BodyLimit(stored, "max_payload of the broker (nats-server)")
