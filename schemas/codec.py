"""Encode events to stored bytes and decode them.

A reader judges an event by its header (`decode_header`) before it decodes the rest: an event of an unknown type, or
of a known type with a malformed body, still occupies its seq.
"""

from typing import Any

import msgspec

from schemas.events import AnyEvent, Epoch, Event, Number

__all__ = ["Header", "MalformedEvent", "UnknownEvent", "decode_event", "decode_header", "encode_event"]


class Header(msgspec.Struct):
    """The fields of an event that the acceptance rule needs; cheaper to decode than the whole event."""

    generation: str
    seq: Number
    type: str
    epoch: Epoch = 1
    tokens: Number = 0
    at: float = 0.0


class MalformedEvent(ValueError):
    """Bytes that are not an event: not JSON, or a known type with a wrong shape.

    ``header`` is set in the second case.
    """

    def __init__(self, message: str, header: Header | None = None) -> None:
        self.header = header
        super().__init__(message)


class UnknownEvent(ValueError):
    """A well-formed event of an unknown type; readers skip and count it."""

    def __init__(self, type_: str, header: Header | None = None) -> None:
        self.type = type_
        self.header = header
        super().__init__(f"unknown event type {type_!r}: skipped by this version")


# Errors of msgspec for untrusted bytes: its own, for invalid UTF-8, and for too deep nesting.
_REFUSALS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_KNOWN = frozenset(t.__struct_config__.tag for t in AnyEvent.__args__)
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)
_header_decoder = msgspec.json.Decoder(Header)


def encode_event(event: Event) -> bytes:
    """Return the bytes of an event as stored and, unchanged, sent to native clients.

    Lone surrogates, which UTF-8 cannot encode, become U+FFFD; two halves of a pair are joined.
    """
    try:
        return _encoder.encode(event)
    except UnicodeEncodeError:
        return _encoder.encode(_scalar(msgspec.to_builtins(event)))


def decode_event(data: bytes) -> AnyEvent:
    """Decode a stored event.

    Raises:
        UnknownEvent: the type is unknown to this version.
        MalformedEvent: ``data`` is not JSON, or has a wrong shape.
    """
    try:
        return _decoder.decode(data)
    except _REFUSALS as error:
        header = decode_header(data)
        if header.type not in _KNOWN:
            raise UnknownEvent(header.type, header) from None
        raise MalformedEvent(f"malformed {header.type} event: {error}", header) from error


def decode_header(data: bytes) -> Header:
    """Return type, generation, epoch, seq and running token count of an event of any type, known or not.

    Raises:
        MalformedEvent: ``data`` is not a JSON object with those fields.
    """
    try:
        return _header_decoder.decode(data)
    except _REFUSALS as error:
        raise MalformedEvent(f"malformed event: {error}") from error


def _scalar(value: Any) -> Any:
    """Return a JSON value whose strings contain only Unicode scalar values."""
    match value:
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case list():
            return [_scalar(item) for item in value]
        case dict():
            return {_scalar(name): _scalar(item) for name, item in value.items()}
        case _:
            return value
