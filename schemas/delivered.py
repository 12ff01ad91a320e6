"""What subscribers were sent of a generation, as delivery tells billing: coalesced, never per token."""

from typing import Annotated, Final

import msgspec

from schemas.names import NAME_PATTERN, check_name
from schemas.usage import Number

__all__ = ["DELIVERED_FILTER", "DeliveredReport", "decode_delivered", "delivered_subject", "encode_delivered"]

DELIVERED_FILTER: Final = "delivered.*.*.*"
Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]


class DeliveredReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was sent of one generation so far, as one counter of a delivery replica saw it.

    ``counter`` names the counter: another one for each replica and each time that it begins to count anew; a
    generation's numbers are the sums over its counters. Each report has all that its counter has seen, and the highest
    ``number`` (1, 2 …) holds, so that a lost or repeated one does no harm.

    ``subscribers``: streams that were sent anything of it. ``events`` and ``bytes``: to all of them together, bytes of
    the events as stored. ``tokens``: the running count that the furthest of them has reached; ``sent_tokens``: those
    sent to all of them together. ``at``: seconds since 1970.
    """

    tenant: Name
    session: Name
    generation: Name
    counter: Name
    number: Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1)]
    subscribers: Number = 0
    events: Number = 0
    tokens: Number = 0
    sent_tokens: Number = 0
    bytes: Number = 0
    at: float = 0.0


_decoder: Final = msgspec.json.Decoder(DeliveredReport)


def delivered_subject(tenant: str, session: str, generation: str) -> str:
    """Return the subject of a generation's reports.

    Raises:
        InvalidName: a name cannot stand in a subject.
    """
    names = (check_name("tenant", tenant), check_name("session", session), check_name("generation", generation))
    return ".".join(("delivered", *names))


def encode_delivered(report: DeliveredReport) -> bytes:
    """Return the bytes that are stored."""
    return msgspec.json.encode(report)


def decode_delivered(data: bytes) -> DeliveredReport:
    """Return the report that ``data`` holds.

    Raises:
        ValueError: it is none.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"not a report of what was delivered: {error}") from error
