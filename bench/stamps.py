"""Send times of tokens, shared by provider and clients through a mapped file.

A stamp stands beside the stream and not in it: the pipeline carries, counts and stores natural text, and a stamp
survives whatever is done to the stream (several tokens in one event, several events in one read), because the
number of characters received says which tokens have arrived. Times are ``time.monotonic_ns``, one clock for all
processes of a machine.
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
        """Make the file for ``count`` stamps."""
        with path.open("wb") as file:
            file.truncate(max(count, 1) * 8)

    def first(self) -> int:
        """Return the earliest send time, 0 without any."""
        return min((stamp for stamp in self.cells if stamp), default=0)
