"""Encode and parse tokens, with which a service settles its deliveries. Pure.

A token names a delivery, never a subject: its acknowledgement always goes to the consumer of the tenant and name that
the request was authorized for. So a forged token can settle only events of its sender.
"""

import re
from typing import Final, NamedTuple

from services.delivery.consumers.definition import AGAIN, stream_of
from services.kit.jetstream.ack import Delivered, ack_subject

__all__ = ["InvalidToken", "Token"]

_SHAPE: Final = re.compile(r"k1(again|[0-9a-f]{2})([0-9a-f]{8})([0-9a-f]{12})([0-9a-f]{12})([0-9a-f]{6})")


class InvalidToken(ValueError):
    """The text is not the token of a delivery."""

    def __init__(self, text: str) -> None:
        super().__init__(f"token {text[:60]!r} is not the token of a delivered event")


class Token(NamedTuple):
    """One delivery of one event.

    ``seq``: its stream sequence, in this ``incarnation`` of its partition's stream. ``consumer_seq``: the number of the
    delivery among all of the consumer's; ``deliveries``: among those of this event.
    """

    partition: int
    incarnation: str
    seq: int
    consumer_seq: int
    deliveries: int

    def text(self) -> str:
        """Encode the token for clients."""
        partition_text = "again" if self.partition == AGAIN else f"{self.partition:02x}"
        count = min(self.deliveries, 0xFFFFFF)
        return f"k1{partition_text}{self.incarnation}{self.seq:012x}{self.consumer_seq:012x}{count:06x}"

    @classmethod
    def parse(cls, text: str) -> "Token":
        """Parse the token that a client sends.

        Raises:
            InvalidToken: the text is not a token.
        """
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise InvalidToken(text)
        partition_text, incarnation, *numbers = match.groups()
        partition = AGAIN if partition_text == "again" else int(partition_text, 16)
        return cls(partition, incarnation, *(int(number, 16) for number in numbers))

    def subject(self, durable: str) -> str:
        """Return the subject for acknowledgements of the delivery."""
        numbers = Delivered(self.deliveries, self.seq, self.consumer_seq)
        return ack_subject(stream_of(self.partition), durable, numbers)
