"""Events to stored bytes and back."""

import msgspec

from schemas.events import AnyEvent, Event

__all__ = ["Header", "MalformedEvent", "UnknownEvent", "decode_event", "decode_header", "encode_event"]


class MalformedEvent(ValueError):
    """Bytes that are not an event: not JSON, or a known type with a wrong shape."""


class UnknownEvent(ValueError):
    """A well-formed event of a type that this version does not know; readers skip and count it."""

    def __init__(self, type_: str) -> None:
        self.type = type_
        super().__init__(f"unknown event type {type_!r}: skipped by this version")


class Header(msgspec.Struct):
    """The part of an event that the acceptance rule needs; cheaper to decode than the whole event."""

    generation: str
    seq: int
    type: str
    epoch: int = 1
    tokens: int = 0


_KNOWN = frozenset(t.__struct_config__.tag for t in AnyEvent.__args__)
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)
_header_decoder = msgspec.json.Decoder(Header)


def encode_event(event: Event) -> bytes:
    """Return the bytes that are stored and, unchanged, sent to native clients."""
    return _encoder.encode(event)


def decode_event(data: bytes) -> AnyEvent:
    """Return the event that ``data`` holds.

    Raises:
        UnknownEvent: the type is not known to this version.
        MalformedEvent: anything else is wrong with it.
    """
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError as error:
        header = decode_header(data)
        if header.type not in _KNOWN:
            raise UnknownEvent(header.type) from None
        raise MalformedEvent(f"malformed {header.type} event: {error}") from error


def decode_header(data: bytes) -> Header:
    """Return type, generation, epoch, seq and running token count of an event of any type, known or not.

    Raises:
        MalformedEvent: it is not a JSON object with those fields.
    """
    try:
        return _header_decoder.decode(data)
    except msgspec.DecodeError as error:
        raise MalformedEvent(f"malformed event: {error}") from error
