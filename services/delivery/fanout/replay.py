"""Events from the log for one subscriber that is behind what its feed keeps in memory."""

from collections.abc import Callable, Sequence
from typing import Final

from services.delivery.fanout.subscriber import Subscriber
from services.delivery.formats.format import Address
from services.delivery.formats.granularity import Chunker, Position
from services.delivery.formats.tail import Entry
from services.delivery.log.reader import LogReader

__all__ = ["replay"]

PIECE_BYTES: Final = 65_536  # the HTTP server takes several pieces ahead of a slow client


class _Piece:
    """What is gathered for one write."""

    def __init__(self, subscriber: Subscriber) -> None:
        self.frames: list[bytes] = []
        self.was_last = False  # the stream is to end: looked at behind each write, so that a wish to end costs none
        self._subscriber = subscriber
        self._events = 0
        self._size = 0

    def add(self, frame: bytes) -> None:
        self.frames.append(frame)
        self._events += 1
        self._size += len(frame)

    @property
    def is_full(self) -> bool:
        subscriber = self._subscriber
        return self._size >= min(PIECE_BYTES, subscriber.space) or self._events >= subscriber.room

    async def send(self, place: Position, *, ends: bool = False) -> None:
        """Send it, and wait until there is room for another: who reads is then served up to ``place``."""
        subscriber = self._subscriber
        if self.frames:
            subscriber.count(self._events, self._size)  # first: what the client answers may grant more at once
            await subscriber.send(subscriber.format.message(self.frames, ends=ends))
        subscriber.place = place
        self.frames, self._events, self._size = [], 0, 0
        if not ends:
            await subscriber.has_room()
        self.was_last = subscriber.done.done()


class _Replay:
    """Frames stored events in the subscriber's granularity, and sends them in pieces."""

    def __init__(self, subscriber: Subscriber, at: Address) -> None:
        self._subscriber = subscriber
        self._at = at
        self._piece = _Piece(subscriber)
        self._merger = Chunker(subscriber.grain, subscriber.place)

    @property
    def is_over(self) -> bool:
        """Whether the stream is to end and nothing more is to be sent."""
        return self._piece.was_last

    async def take(self, entry: Entry) -> bool:
        """Show one event; return whether the wanted generation ends with it."""
        if entry.gap and self._subscriber.generation in (None, entry.generation):
            await self._show(self._merger.release())
            self._piece.frames.append(self._subscriber.format.gap(entry.gap, entry.generation, self._at))
        return await self._show(self._merger.offer(entry, 0.0))

    async def pause(self, seq: int) -> None:
        """Send what there is; everything up to the stream sequence ``seq`` has been taken."""
        await self._piece.send(self._merger.place(seq))

    async def end(self) -> None:
        """Send what is held as well."""
        await self._show(self._merger.release())

    async def _show(self, entries: list[Entry]) -> bool:
        subscriber, piece = self._subscriber, self._piece
        for entry in entries:
            if piece.was_last:
                return False
            piece.add(subscriber.format.frame(entry, self._at))
            ends = subscriber.generation is not None and entry.terminal
            if ends or piece.is_full:
                await piece.send(Position(entry.seq, entry.offset), ends=ends)
            if ends:
                return True
        return False


async def replay(
    reader: LogReader, subscriber: Subscriber, at: Address, floor: int, counted: Callable[[Sequence[Entry]], None]
) -> bool:
    """Serve a subscriber from the log up to the stream sequence ``floor``.

    ``counted`` is told what it has been sent, some events at a time. Returns whether the wanted generation has ended
    with what was sent.

    Raises:
        BrokerUnavailable: the log cannot be read.
    """
    shown = _Replay(subscriber, at)
    filter_ = reader.subject(subscriber.generation or "*")
    last = subscriber.seq
    async for batch in reader.read(filter_, subscriber.seq + 1, floor):
        sent: list[Entry] = []
        try:
            for stored in batch:
                entry = await reader.accept(stored)
                if entry is not None:
                    sent.append(entry)
                    if await shown.take(entry):
                        return True
                if shown.is_over:
                    return False
        finally:
            counted(sent)
        last = batch[-1].seq
        await shown.pause(last)
        if shown.is_over:
            return False
    await shown.end()
    await shown.pause(last)
    return False
