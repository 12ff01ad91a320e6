"""Pass events unencoded to readers that build their own response from one session or several."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from services.delivery.formats.format import Address
from services.delivery.formats.tail import Entry

__all__ = ["HEARTBEAT", "RawBye", "RawGap", "RawEvent", "RawFormat", "raw_event_of"]

_SEQ: Final = 12
_OFFSET: Final = 20
_HEAD: Final = 21


class RawGap(bytes):
    """Frame of missing events: the reason, then a space and the generation if there is one."""


class RawBye(bytes):
    """Last frame of a stream that can be resumed: the reason."""


HEARTBEAT: Final[list[bytes]] = []
"""The empty message."""


class RawEvent(NamedTuple):
    """One event and the position after it; see `Entry`."""

    seq: int
    offset: int
    moved: bool
    data: bytes


def raw_event_of(frame: bytes) -> RawEvent:
    """Return the event that a frame of `RawFormat` holds."""
    seq, offset = int(frame[:_SEQ], 16), int(frame[_SEQ:_OFFSET], 16)
    return RawEvent(seq, offset, frame[_OFFSET:_HEAD] == b"1", frame[_HEAD:])


class RawFormat:
    """Encode events as frames for `raw_event_of`, and `RawGap` and `RawBye`; a message is a list of frames.

    ``protocol``: the name of the protocol built from them.
    """

    def __init__(self, protocol: str, *, heartbeats: bool = False) -> None:
        self.protocol = protocol
        self._heartbeats = heartbeats

    def frame(self, entry: Entry, at: Address) -> bytes:
        """Return one event, preceded by its position."""
        return b"%012x%08x%d%b" % (entry.seq, entry.offset, entry.moved, entry.data)

    def message(self, frames: Sequence[bytes], *, ends: bool) -> list[bytes]:
        """Return the frames."""
        return list(frames)

    def opening(self, at: Address) -> bytes:
        """Return no bytes."""
        return b""

    def gap(self, reason: str, generation: str | None, at: Address) -> bytes:
        """Return a `RawGap`."""
        return RawGap(f"{reason} {generation}".encode() if generation else reason.encode())

    def bye(self, reason: str, seq: int, at: Address) -> bytes:
        """Return a `RawBye`."""
        return RawBye(reason.encode())

    def heartbeat(self) -> Any | None:
        """Return `HEARTBEAT`, or None if heartbeats are off."""
        return HEARTBEAT if self._heartbeats else None
