"""Acknowledgement subjects of JetStream: what they tell of a delivery, and what is published on them. Pure.

A message that a consumer delivers has as its reply subject, by the server's version of it:

    $JS.ACK.<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<time>.<pending>
    $JS.ACK.<domain>.<account>.<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<time>.<pending>[.<token>]

The first form has 9 tokens, the second, of servers with a domain, 11 or 12 (as in nats.go).
"""

from typing import Final, NamedTuple

import msgspec

__all__ = [
    "ACK",
    "AT_ONCE",
    "IN_PROGRESS",
    "TERM",
    "Delivered",
    "StoredAt",
    "ack_subject",
    "delivered",
    "nak",
    "stored_at",
]

ACK: Final = b"+ACK"
"""Handled: the message is not delivered again. An empty payload says the same."""
IN_PROGRESS: Final = b"+WPI"
"""Still being worked on: ``ack_wait`` begins anew."""
TERM: Final = b"+TERM"
"""Never to be delivered again, although it was not handled."""
_SHORT: Final = 9


class Delivered(NamedTuple):
    """Numbers of a delivery.

    ``deliveries``: how often the message has been delivered, this time included. ``seq``: its stream sequence.
    ``consumer_seq``: number of the delivery among all of the consumer's.
    """

    deliveries: int
    seq: int
    consumer_seq: int


class StoredAt(NamedTuple):
    """Where a delivered message is stored: its stream sequence, when it was stored in nanoseconds since 1970, and how
    many messages the consumer had not delivered yet.
    """

    seq: int
    stamp: int
    pending: int


def delivered(reply: bytes) -> Delivered:
    """Return the delivery's numbers.

    Raises:
        ValueError: this is no acknowledgement subject.
    """
    parts = reply.split(b".")
    at = 4 if len(parts) == _SHORT else _in_long_form(parts)
    return Delivered(int(parts[at]), int(parts[at + 1]), int(parts[at + 2]))


def stored_at(reply: bytes) -> StoredAt:
    """Return where the delivered message is stored.

    Raises:
        ValueError: this is no acknowledgement subject.
    """
    parts = reply.split(b".")
    at = 4 if len(parts) == _SHORT else _in_long_form(parts)
    return StoredAt(int(parts[at + 1]), int(parts[at + 3]), int(parts[at + 4]))


def _in_long_form(parts: list[bytes]) -> int:
    """Return the index of the first number."""
    if len(parts) <= _SHORT + 1:
        raise ValueError(f"{b'.'.join(parts)[:200]!r} is no acknowledgement subject: it has {len(parts)} tokens")
    return 6


def ack_subject(stream: str, consumer: str, delivery: Delivered) -> str:
    """Return the subject on which the server hears what became of a delivery. It reads neither time nor pending."""
    return f"$JS.ACK.{stream}.{consumer}.{delivery.deliveries}.{delivery.seq}.{delivery.consumer_seq}.0.0"


def nak(delay: float = 0.0) -> bytes:
    """Return the payload that has a message delivered again, after ``delay`` seconds."""
    return b"-NAK" + (msgspec.json.encode({"delay": round(delay * 1e9)}) if delay > 0 else b"")


AT_ONCE: Final = nak(1e-9)
"""Deliver again now. With a delay, however short, the server writes down that the message is free again: that survives
its restart."""
