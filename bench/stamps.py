"""Send times of tokens, shared by provider and clients through a mapped file.

Stamps are kept outside the stream, so that the pipeline relays, counts and stores natural text. They are independent of
the chunking (several tokens in one event, several events in one read): the number of characters received determines
which tokens have arrived. Times are ``time.monotonic_ns``, one clock for all processes of a machine.
"""

import mmap
from pathlib import Path

__all__ = ["Stamps"]


class Stamps:
    """A row of send times in nanoseconds; 0 means not sent."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.cells = memoryview(self._map).cast("q")

    @staticmethod
    def create(path: Path, count: int) -> None:
        """Create the file for ``count`` stamps."""
        with path.open("wb") as file:
            file.truncate(max(count, 1) * 8)

    def first(self) -> int:
        """Return the earliest send time, or 0 without any."""
        return min((stamp for stamp in self.cells if stamp), default=0)
