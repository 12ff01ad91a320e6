"""Define the port through which a feed encodes events for a protocol."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from services.delivery.formats.tail import Entry

__all__ = ["Address", "Format"]


class Address(NamedTuple):
    """Build cursors of one session: its name, and the cursor prefix before the stream sequence.

    ``offset``: characters of the next event that cursors from `cursor` include.
    """

    session: str
    prefix: bytes
    offset: int = 0

    def cursor(self, seq: int) -> bytes:
        """Return the cursor after the event with this stream sequence."""
        if self.offset:
            return b"%b%012x.%08x" % (self.prefix, seq, self.offset)
        return b"%b%012x" % (self.prefix, seq)

    def after(self, entry: Entry) -> bytes:
        """Return the cursor after an event, or after a piece that ends inside of one."""
        if entry.offset:
            return b"%b%012x.%08x" % (self.prefix, entry.seq, entry.offset)
        return b"%b%012x" % (self.prefix, entry.seq)

    def inside(self, offset: int) -> "Address":
        """Return an address whose cursors include ``offset`` characters of the next event."""
        return self._replace(offset=offset) if offset else self


class Format(Protocol):
    """Encode a session for one protocol; stateless, so one object serves all subscribers.

    `frame` is called once for an event, `message` once for all subscribers at the same position. A message has the type
    that the subscriber's ``send`` takes.
    """

    protocol: str

    def frame(self, entry: Entry, at: Address) -> bytes:
        """Return the frame of one event."""
        ...

    def message(self, frames: Sequence[bytes], *, ends: bool) -> Any:
        """Return the message that holds several frames; ``ends``: it is the last one."""
        ...

    def opening(self, at: Address) -> bytes:
        """Return the bytes sent before all events, possibly empty."""
        ...

    def gap(self, reason: str, generation: str | None, at: Address) -> bytes:
        """Return the frame that reports missing events of a generation, or of the session if None."""
        ...

    def bye(self, reason: str, seq: int, at: Address) -> bytes:
        """Return the last frame of a stream that can be resumed after the stream sequence ``seq``."""
        ...

    def heartbeat(self) -> Any | None:
        """Return the message that keeps an idle connection open, or None if the protocol does that itself."""
        ...
