"""What a protocol must say about events so that a feed can be shown over it."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from services.delivery.formats.tail import Entry

__all__ = ["Address", "Format"]


class Address(NamedTuple):
    """Whose events these are: the session's name, and its cursors without their stream sequence.

    ``offset``: characters of the event behind a cursor that are shown as well, where `cursor` is to say so.
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
        """Return an address whose cursors say that so many characters of the next event are shown."""
        return self._replace(offset=offset) if offset else self


class Format(Protocol):
    """How one protocol shows a session; without state, so that one object serves all its subscribers.

    `frame` is called once for an event, `message` once for all subscribers that stand at the same place. A message is
    whatever the subscriber's ``send`` takes.
    """

    protocol: str

    def frame(self, entry: Entry, at: Address) -> bytes:
        """Return one event."""
        ...

    def message(self, frames: Sequence[bytes], *, ends: bool) -> Any:
        """Return what is sent for several frames at once; ``ends``: nothing follows."""
        ...

    def opening(self, at: Address) -> bytes:
        """Return what stands before everything else, or nothing."""
        ...

    def gap(self, reason: str, generation: str | None, at: Address) -> bytes:
        """Return what says out loud that something is missing, and of what."""
        ...

    def bye(self, reason: str, seq: int, at: Address) -> bytes:
        """Return what ends a stream that can be resumed after the stream sequence ``seq``."""
        ...

    def heartbeat(self) -> Any | None:
        """Return the message that keeps a silent connection open, or nothing where the protocol does that itself."""
        ...
