"""Delivery reports to billing: counts of what subscribers were sent of a generation, coalesced, never per token."""

from typing import Annotated, Final

import msgspec

from schemas.names import NAME_PATTERN, check_name
from schemas.usage import Number

__all__ = ["DELIVERED_FILTER", "DeliveredReport", "decode_delivered", "delivered_subject", "encode_delivered"]

DELIVERED_FILTER: Final = "delivered.*.*.*"
Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]


class DeliveredReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was sent of one generation so far, as counted by one counter of a delivery replica.

    ``counter``: its name, a new one for each replica and each restart of counting; a generation's numbers are the sums
    over its counters. Reports are cumulative and the one with the highest ``number`` (1, 2 …) is valid, so lost or
    repeated reports do no harm.

    ``subscribers``: streams that were sent any event of it. ``events`` and ``bytes``: sums over all streams, bytes of
    the events as stored. ``tokens``: the highest running count sent to a stream; ``sent_tokens``: the sum over all
    streams. ``at``: seconds since 1970.
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
        InvalidName: a name is not a valid subject token.
    """
    names = (check_name("tenant", tenant), check_name("session", session), check_name("generation", generation))
    return ".".join(("delivered", *names))


def encode_delivered(report: DeliveredReport) -> bytes:
    """Return a report as stored."""
    return msgspec.json.encode(report)


def decode_delivered(data: bytes) -> DeliveredReport:
    """Decode a stored report.

    Raises:
        ValueError: ``data`` is not a report.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"not a delivery report: {error}") from error
