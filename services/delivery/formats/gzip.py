"""Compress streams with gzip, once for all clients that receive the same message.

A gzip stream is a header, deflate blocks, and a checksum of the bytes sent to one client. The blocks of a message do
not refer to earlier data and end at a whole byte, so they fit at any position of any client's stream; only the checksum
is computed for each client.
"""

import struct
import zlib
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from services.delivery.formats.format import Address, Format
from services.delivery.formats.negotiation import negotiate
from services.delivery.formats.sse import http_body
from services.delivery.formats.tail import Entry

__all__ = ["GZIPPED", "Block", "Gzipped", "Wrapping", "takes_gzip", "whole_gzip"]

GZIPPED: Final = (b"content-encoding", b"gzip")
LEVEL: Final = 1  # level 6 saves little more of such texts, for two to three times the work
_HEADER: Final = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_END: Final = b"\x03\x00"
_RAW_DEFLATE: Final = -15


def takes_gzip(accept_encoding: str | None) -> bool:
    """Return whether a client accepts gzip."""
    return accept_encoding is not None and negotiate(accept_encoding, ["gzip"]) is not None


def whole_gzip(body: bytes) -> bytes:
    """Return a complete body compressed with gzip."""
    return zlib.compress(body, LEVEL, 31)


class Block(NamedTuple):
    """A message: its plain bytes, its compressed bytes, and whether it is the last one."""

    plain: bytes
    packed: bytes
    ends: bool


class Gzipped:
    """Wrap a format so that its messages are `Block` for `Wrapping`; stateless, like any format."""

    def __init__(self, inner: Format) -> None:
        self.protocol = inner.protocol
        self._inner = inner

    def frame(self, entry: Entry, at: Address) -> bytes:
        """Return the frame of one event."""
        return self._inner.frame(entry, at)

    def opening(self, at: Address) -> bytes:
        """Return the bytes sent before all events."""
        return self._inner.opening(at)

    def gap(self, reason: str, generation: str | None, at: Address) -> bytes:
        """Return the frame that reports missing events."""
        return self._inner.gap(reason, generation, at)

    def bye(self, reason: str, seq: int, at: Address) -> bytes:
        """Return the last frame of a stream that can be resumed."""
        return self._inner.bye(reason, seq, at)

    def message(self, frames: Sequence[bytes], *, ends: bool) -> Block:
        """Return these frames, compressed."""
        return _block(b"".join(frames), ends)

    def heartbeat(self) -> Block | None:
        """Return a heartbeat, compressed."""
        message = self._inner.heartbeat()
        return None if message is None else _block(message["body"], ends=False)


class Wrapping:
    """Write the gzip stream of one client."""

    def __init__(self) -> None:
        self._crc = 0
        self._size = 0

    def body(self, block: Block) -> dict[str, Any]:
        """Return the body message that sends a block to this client."""
        data = block.packed if self._size else _HEADER + block.packed
        self._crc = zlib.crc32(block.plain, self._crc)
        self._size += len(block.plain)
        if block.ends:
            data += _END + struct.pack("<II", self._crc, self._size & 0xFFFFFFFF)
        return http_body(data, more=not block.ends)


def _block(plain: bytes, ends: bool) -> Block:
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, _RAW_DEFLATE)
    return Block(plain, packer.compress(plain) + packer.flush(zlib.Z_SYNC_FLUSH), ends)
