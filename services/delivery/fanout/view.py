"""Write a feed's entries to its subscribers: as stored, or joined and cut to a granularity."""

import asyncio
from typing import Final

from services.delivery import metrics
from services.delivery.fanout.subscriber import Progress, State, Subscriber
from services.delivery.formats.format import Address, Format
from services.delivery.formats.frames import Chunk, Frames
from services.delivery.formats.granularity import TOKEN, Chunker, Granularity, Position, rest
from services.delivery.formats.tail import Tail
from services.kit.clock import Clock

__all__ = ["View", "Views"]

WRITE_BYTES: Final = 128 * 1024  # the HTTP server takes several writes ahead of a slow client
_SHARE: Final = 4  # a granularity keeps this fraction of the feed's bytes; subscribers further behind read from the log


class View:
    """Serve the entries of one granularity to its subscribers, framed once for each format.

    ``source`` is the feed's own tail, which is served unchanged; `ChunkedView` derives another tail from it.
    """

    def __init__(self, source: Tail, at: Address, clock: Clock) -> None:
        self.source = source
        self.tail = source
        self.subscribers: set[Subscriber] = set()
        self.waiting: set[Subscriber] = set()  # served from the log until they can be served here
        self._at = at
        self._clock = clock
        self._frames: dict[Format, Frames] = {}

    @property
    def floor(self) -> int:
        """The lowest stream sequence that a subscriber can be served from here."""
        return self.tail.floor

    def add(self, subscriber: Subscriber) -> None:
        """Serve a subscriber; one below the floor falls behind and reads from the log."""
        subscriber.index = self.tail.after(subscriber.seq, subscriber.offset)
        subscriber.move(State.LIVE)
        subscriber.joining = self._is_inside(subscriber)
        self.subscribers.add(subscriber)
        subscriber.on_ready(self.serve)
        self.serve(subscriber)

    def follow(self, now: float) -> None:
        """Take new entries from the source."""

    def close(self) -> None:
        """Stop taking entries."""

    def flush(self, now: float) -> int:
        """Write to every ready subscriber, one chunk for all at the same index; return the number of writes."""
        self.follow(now)
        end = self.tail.end
        chunks: dict[tuple[Format, str | None, int, int, int], tuple[Chunk, Progress]] = {}
        usual = moved = None  # the most recent common progress, before and after its chunk
        message: object = None
        writes = quick = count = 0
        for subscriber in tuple(self.subscribers):
            # Fast path: the same progress as the subscriber before, and nothing to check.
            if subscriber.progress is usual and subscriber.quick and moved is not None:
                subscriber.progress = moved
                offer = subscriber.offer
                if offer is None or not offer(message):
                    subscriber.start(message)
                quick += 1
                continue
            progress = subscriber.progress
            if progress.index >= end or not subscriber.ready:
                continue
            if progress.index < self.tail.base:
                subscriber.fall_behind()
                continue
            # Build the chunk once for all subscribers with the same format, generation and progress.
            key = (subscriber.format, subscriber.generation, progress.index, progress.seq, progress.offset)
            known = chunks.get(key)
            if known is None:
                chunk = self._framed(subscriber).chunk(progress.index, subscriber.generation, WRITE_BYTES)
                known = chunks[key] = chunk, subscriber.behind(chunk)
            chunk, behind = known
            writes += 1
            # Less credit than the chunk needs, or inside an entry: serve this one on its own.
            if chunk.count > subscriber.room or chunk.size > subscriber.space or subscriber.joining:
                self.serve(subscriber)
                continue
            subscriber.deliver(chunk, behind)
            if behind.index < end:
                self.serve(subscriber)
            # Later subscribers with this progress take the fast path.
            elif chunk.count and not chunk.ends:
                if usual is not None:
                    metrics.EVENTS_OUT.inc(quick * count)
                    writes, quick = writes + quick, 0
                usual, moved, message, count = progress, behind, chunk.message, chunk.count
        metrics.EVENTS_OUT.inc(quick * count)
        return writes + quick

    def serve(self, subscriber: Subscriber) -> None:
        """Write missed entries to one subscriber until it is up to date or has to wait."""
        while subscriber.ready and subscriber.joined and subscriber.index < self.tail.end:
            if subscriber.index < self.tail.base or (subscriber.joining and subscriber.seq < self.source.floor):
                subscriber.fall_behind()
                return
            if subscriber.joining:  # an entry appended since may end at its position
                subscriber.index = max(subscriber.index, self.tail.after(subscriber.seq, subscriber.offset))
                if subscriber.index >= self.tail.end:
                    return
            subscriber.deliver(self._first(subscriber) or self._granted(subscriber))

    def _is_inside(self, subscriber: Subscriber) -> bool:
        """Return whether a subscriber's position may be inside an entry."""
        return subscriber.offset > 0

    def _granted(self, subscriber: Subscriber) -> Chunk:
        """Return the next chunk that the subscriber's credit allows."""
        size = min(WRITE_BYTES, subscriber.space)
        return self._framed(subscriber).chunk(subscriber.index, subscriber.generation, size, subscriber.room)

    def _first(self, subscriber: Subscriber) -> Chunk | None:
        """Return the rest of the entry that contains the subscriber's position, if any."""
        if not subscriber.joining:
            return None
        subscriber.joining = False
        entry = self.tail.slice(subscriber.index, subscriber.index + 1)[0]
        if entry.type != "delta" or subscriber.generation not in (None, entry.generation):
            return None
        stop = self.source.after(entry.seq) + (entry.offset > 0)
        covered = self.source.slice(self.source.after(subscriber.seq), stop)
        left = rest(covered, subscriber.position, Position(entry.seq, entry.offset))
        if left is None:
            return None
        frame = subscriber.format.frame(left, self._at)
        message = subscriber.format.message([frame], ends=False)
        return Chunk(message, 1, len(frame), subscriber.index + 1, left.seq, False, left.offset)

    def _framed(self, subscriber: Subscriber) -> Frames:
        frames = self._frames.get(subscriber.format)
        if frames is None:
            frames = self._frames[subscriber.format] = Frames(self.tail, subscriber.format, self._at)
        return frames


class ChunkedView(View):
    """Serve pieces of another granularity, joined once for all subscribers.

    It begins at ``position`` and keeps at most ``max_bytes``; one timer releases text when its hold time ends.
    """

    def __init__(
        self, source: Tail, at: Address, clock: Clock, granularity: Granularity, position: Position, max_bytes: int
    ) -> None:
        super().__init__(source, at, clock)
        self.tail = Tail(position.seq + (position.offset > 0), max_bytes)
        self._granularity = granularity
        self._chunker = Chunker(granularity, position)
        self._read = source.after(position.seq)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, subscriber: Subscriber) -> None:
        """Serve a subscriber, first the rest of the piece that contains its position, if any."""
        self.follow(self._clock.monotonic())
        if self.tail.base and subscriber.seq < self.floor:  # appending new pieces has dropped its next entry
            subscriber.fall_behind()
            return
        super().add(subscriber)

    def follow(self, now: float) -> None:
        """Join new entries; restart when the source has dropped entries not joined yet."""
        source, chunker, append = self.source, self._chunker, self.tail.append
        if self._read < source.base:
            self.tail.restart(source.floor)
            self._frames.clear()
            chunker = self._chunker = Chunker(self._granularity, Position(source.floor))
            self._read = source.base
        for entry in source.slice(self._read, source.end):
            for piece in chunker.offer(entry, now):
                append(piece)
        self._read = source.end
        for piece in chunker.settle(now):
            append(piece)
        if self._timer is None and chunker.due is not None:
            self._timer = self._loop.call_later(max(0.0, chunker.due - now), self._let_out)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _is_inside(self, subscriber: Subscriber) -> bool:
        index, base = subscriber.index, self.tail.base
        before = self.tail.slice(index - 1, index)[0] if index > base else None
        return before is None or (before.seq, before.offset) != subscriber.position

    def _let_out(self) -> None:
        self._timer = None
        metrics.WRITES.inc(self.flush(self._clock.monotonic()))


class Views:
    """Hold the views of a feed: its own tail, and one for each granularity in use."""

    def __init__(self, tail: Tail, at: Address, clock: Clock, max_bytes: int) -> None:
        self.tail = tail
        self._at = at
        self._clock = clock
        self._max_bytes = max_bytes
        self._views: dict[Granularity, View] = {TOKEN: View(tail, at, clock)}  # at most one for each `Granularity`

    @property
    def size(self) -> int:
        """Bytes of the entries of all views."""
        return sum(view.tail.bytes for view in self._views.values())

    def floor(self, subscriber: Subscriber) -> int:
        """Return the lowest stream sequence from which a subscriber can be served from memory."""
        view = self._views.get(subscriber.granularity)
        return self.tail.floor if view is None else max(self.tail.floor, view.floor)

    def add(self, subscriber: Subscriber) -> None:
        """Serve a subscriber from memory; it must be at or above its floor."""
        view = self._views.get(subscriber.granularity)
        if view is None:
            position, size = subscriber.position, self._max_bytes // _SHARE
            view = ChunkedView(self.tail, self._at, self._clock, subscriber.granularity, position, size)
            self._views[subscriber.granularity] = view
        view.waiting.discard(subscriber)
        view.add(subscriber)

    def hold(self, subscriber: Subscriber) -> None:
        """Pause serving a subscriber; keep its view."""
        view = self._views.get(subscriber.granularity)
        if view is not None:
            view.subscribers.discard(subscriber)
            view.waiting.add(subscriber)

    def remove(self, subscriber: Subscriber) -> None:
        """Remove a subscriber, and its view after the last one."""
        view = self._views.get(subscriber.granularity)
        if view is None:
            return
        view.subscribers.discard(subscriber)
        view.waiting.discard(subscriber)
        if not view.subscribers and not view.waiting and subscriber.granularity != TOKEN:
            view.close()
            del self._views[subscriber.granularity]

    def flush(self) -> int:
        """Write new entries in all views; return the number of writes."""
        now = self._clock.monotonic()
        return sum(view.flush(now) for view in tuple(self._views.values()))

    def close(self) -> None:
        """Stop all timers."""
        for view in self._views.values():
            view.close()
