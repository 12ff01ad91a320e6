"""Replay events from the log to one subscriber that is behind its feed's memory."""

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
    """Collect the frames of one write."""

    def __init__(self, subscriber: Subscriber) -> None:
        self.frames: list[bytes] = []
        self.was_last = False  # the stream ends; checked after each write, so that stopping loses none
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

    async def send(self, position: Position, *, ends: bool = False) -> None:
        """Send the frames, advance the subscriber to ``position``, and wait for credit unless the stream ends."""
        subscriber = self._subscriber
        if self.frames:
            subscriber.count(self._events, self._size)  # before sending: the client's reply may grant credit at once
            await subscriber.send(subscriber.format.message(self.frames, ends=ends))
        subscriber.position = position
        self.frames, self._events, self._size = [], 0, 0
        if not ends:
            await subscriber.has_room()
        self.was_last = subscriber.done.done()


class _Replay:
    """Frame stored events in the subscriber's granularity, and send them in pieces."""

    def __init__(self, subscriber: Subscriber, at: Address) -> None:
        self._subscriber = subscriber
        self._at = at
        self._piece = _Piece(subscriber)
        self._chunker = Chunker(subscriber.granularity, subscriber.position)

    @property
    def is_over(self) -> bool:
        """Whether the stream ends and no further event is sent."""
        return self._piece.was_last

    async def take(self, entry: Entry) -> bool:
        """Add one event; return whether the requested generation ends with it."""
        if entry.gap and self._subscriber.generation in (None, entry.generation):
            await self._show(self._chunker.release())
            self._piece.frames.append(self._subscriber.format.gap(entry.gap, entry.generation, self._at))
        return await self._show(self._chunker.offer(entry, 0.0))

    async def pause(self, seq: int) -> None:
        """Send the collected frames; all events up to the stream sequence ``seq`` have been added."""
        await self._piece.send(self._chunker.position(seq))

    async def end(self) -> None:
        """Add the text that the chunker still holds."""
        await self._show(self._chunker.release())

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

    ``counted`` is called with the entries of each batch. Returns whether the requested generation has ended within the
    events sent.

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
