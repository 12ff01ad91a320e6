"""The loop that every dialect's parser shares: bytes to events to parts, until the answer ends."""

from abc import ABC, abstractmethod

from services.producer.core.dialects.failures import malformed
from services.producer.core.dialects.joined import Joined
from services.producer.core.parts import Alive, End, Part, UpstreamFailure
from services.producer.core.sse import COMMENT, OversizedEvent, SseDecoder

__all__ = ["EventParser"]


class EventParser(ABC):
    """Feeds the data of each event to `read`, which adds parts to ``joined`` and calls `end` at the end marker.

    A payload that `read` cannot understand (it raises ValueError) ends the answer as malformed.
    """

    __slots__ = ("_decoder", "_ended", "joined")

    def __init__(self) -> None:
        self._decoder = SseDecoder()
        self._ended = False
        self.joined = Joined()

    @abstractmethod
    def read(self, payload: bytes) -> None:
        """Take one event's data, which is never empty.

        Raises:
            ValueError: the data is not what the dialect sends.
        """

    def end(self, part: End | UpstreamFailure) -> None:
        """Add the last part; whatever follows is ignored."""
        self._ended = True
        self.joined.add(part)

    def feed(self, data: bytes) -> list[Part]:
        """Return what ``data`` completes, adjacent fragments of the same kind joined."""
        ended = self._ended
        if ended:
            return []
        try:
            events = self._decoder.feed(data)
        except OversizedEvent as error:
            self.end(malformed(error))
            events = []
        for name, payload in events:
            if name == COMMENT:
                self.joined.add(Alive())
            elif payload:
                try:
                    self.read(payload)
                except (ValueError, RecursionError) as error:
                    self.end(malformed(error, payload))
                if self._ended:
                    break
        return self.joined.take()
