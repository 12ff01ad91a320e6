"""Acknowledgement subjects of JetStream: parse the numbers of a delivery, and build acknowledgements. Pure.

A delivered message has as its reply subject, depending on the server's version:

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
"""Handled: the message is not redelivered. An empty payload means the same."""
IN_PROGRESS: Final = b"+WPI"
"""Still in progress: ``ack_wait`` restarts."""
TERM: Final = b"+TERM"
"""Never redeliver, although it was not handled."""
_SHORT: Final = 9


class Delivered(NamedTuple):
    """The numbers of a delivery.

    ``deliveries``: the number of deliveries of the message, including this one. ``seq``: its stream sequence.
    ``consumer_seq``: the number of the delivery among all of the consumer's.
    """

    deliveries: int
    seq: int
    consumer_seq: int


class StoredAt(NamedTuple):
    """The position of a delivered message: its stream sequence, its storage time in nanoseconds since 1970, and the
    number of messages the consumer had not delivered yet.
    """

    seq: int
    stamp: int
    pending: int


def delivered(reply: bytes) -> Delivered:
    """Parse the numbers of a delivery.

    Raises:
        ValueError: this is no acknowledgement subject.
    """
    parts = reply.split(b".")
    at = 4 if len(parts) == _SHORT else _in_long_form(parts)
    return Delivered(int(parts[at]), int(parts[at + 1]), int(parts[at + 2]))


def stored_at(reply: bytes) -> StoredAt:
    """Parse the position of a delivered message.

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
    """Build the acknowledgement subject of a delivery. The server reads neither its time nor its pending count."""
    return f"$JS.ACK.{stream}.{consumer}.{delivery.deliveries}.{delivery.seq}.{delivery.consumer_seq}.0.0"


def nak(delay: float = 0.0) -> bytes:
    """Return the payload that requests a redelivery after ``delay`` seconds."""
    return b"-NAK" + (msgspec.json.encode({"delay": round(delay * 1e9)}) if delay > 0 else b"")


AT_ONCE: Final = nak(1e-9)
"""Redeliver now. With any delay, the server persists the release of the message, so that it survives a restart."""
