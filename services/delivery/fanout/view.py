"""What a feed holds, written to whoever stands in it: as it is stored, or joined and cut to a granularity."""

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
_SHARE: Final = 4  # a granularity keeps so much less than the feed: who is further behind is read from the log


class View:
    """The entries of one granularity, the frames of each format, and the subscribers that stand in them.

    ``source`` is the feed's own tail, which is shown unchanged; `ChunkedView` derives another one from it.
    """

    def __init__(self, source: Tail, at: Address, clock: Clock) -> None:
        self.source = source
        self.tail = source
        self.subscribers: set[Subscriber] = set()
        self.waiting: set[Subscriber] = set()  # those that are read from the log before they can stand here
        self._at = at
        self._clock = clock
        self._frames: dict[Format, Frames] = {}

    @property
    def floor(self) -> int:
        """The stream sequence from which on one can stand here."""
        return self.tail.floor

    def add(self, subscriber: Subscriber) -> None:
        """Serve a subscriber; it must be at or above the floor, or is sent to the log."""
        subscriber.index = self.tail.after(subscriber.seq, subscriber.offset)
        subscriber.move(State.LIVE)
        subscriber.joining = self._is_inside(subscriber)
        self.subscribers.add(subscriber)
        subscriber.on_ready(self.serve)
        self.serve(subscriber)

    def follow(self, now: float) -> None:
        """Take what is new in the source."""

    def close(self) -> None:
        """Take nothing any more."""

    def flush(self, now: float) -> int:
        """Write to every subscriber that is ready: one chunk for all that stand at the same index. Return how many."""
        self.follow(now)
        end = self.tail.end
        chunks: dict[tuple[Format, str | None, int, int, int], tuple[Chunk, Progress]] = {}
        usual = moved = None  # where most stand, and will when they have got what the one before got
        message: object = None
        writes = quick = count = 0
        for subscriber in tuple(self.subscribers):
            if subscriber.stand is usual and subscriber.quick and moved is not None:
                subscriber.stand = moved
                offer = subscriber.offer
                if offer is None or not offer(message):
                    subscriber.start(message)
                quick += 1
                continue
            stand = subscriber.stand
            if stand.index >= end or not subscriber.ready:
                continue
            if stand.index < self.tail.base:
                subscriber.fall_behind()
                continue
            key = (subscriber.format, subscriber.generation, stand.index, stand.seq, stand.offset)
            known = chunks.get(key)
            if known is None:
                chunk = self._framed(subscriber).chunk(stand.index, subscriber.generation, WRITE_BYTES)
                known = chunks[key] = chunk, subscriber.behind(chunk)
            chunk, behind = known
            writes += 1
            if chunk.count > subscriber.room or chunk.size > subscriber.space or subscriber.joining:
                self.serve(subscriber)
                continue
            subscriber.deliver(chunk, behind)
            if behind.index < end:
                self.serve(subscriber)
            elif chunk.count and not chunk.ends:
                if usual is not None:
                    metrics.EVENTS_OUT.inc(quick * count)
                    writes, quick = writes + quick, 0
                usual, moved, message, count = stand, behind, chunk.message, chunk.count
        metrics.EVENTS_OUT.inc(quick * count)
        return writes + quick

    def serve(self, subscriber: Subscriber) -> None:
        """Write to one subscriber what it has missed, until it is up to date or has to wait."""
        while subscriber.ready and subscriber.joined and subscriber.index < self.tail.end:
            if subscriber.index < self.tail.base or (subscriber.joining and subscriber.seq < self.source.floor):
                subscriber.fall_behind()
                return
            if subscriber.joining:  # what was held when it came may end where it stands
                subscriber.index = max(subscriber.index, self.tail.after(subscriber.seq, subscriber.offset))
                if subscriber.index >= self.tail.end:
                    return
            subscriber.deliver(self._first(subscriber) or self._granted(subscriber))

    def _is_inside(self, subscriber: Subscriber) -> bool:
        """Tell whether a subscriber may stand in the middle of an entry."""
        return subscriber.offset > 0

    def _granted(self, subscriber: Subscriber) -> Chunk:
        """Return what a subscriber may be sent of what it is to get."""
        size = min(WRITE_BYTES, subscriber.space)
        return self._framed(subscriber).chunk(subscriber.index, subscriber.generation, size, subscriber.room)

    def _first(self, subscriber: Subscriber) -> Chunk | None:
        """Return what is left of the entry in whose middle a subscriber stands."""
        if not subscriber.joining:
            return None
        subscriber.joining = False
        entry = self.tail.slice(subscriber.index, subscriber.index + 1)[0]
        if entry.type != "delta" or subscriber.generation not in (None, entry.generation):
            return None
        stop = self.source.after(entry.seq) + (entry.offset > 0)
        covered = self.source.slice(self.source.after(subscriber.seq), stop)
        left = rest(covered, subscriber.place, Position(entry.seq, entry.offset))
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
    """A view whose entries are pieces of another size, joined once for all its subscribers.

    It begins at ``place``, keeps at most ``max_bytes``, and one timer lets out what has been held for long enough.
    """

    def __init__(
        self, source: Tail, at: Address, clock: Clock, grain: Granularity, place: Position, max_bytes: int
    ) -> None:
        super().__init__(source, at, clock)
        self.tail = Tail(place.seq + (place.offset > 0), max_bytes)
        self._grain = grain
        self._merger = Chunker(grain, place)
        self._read = source.after(place.seq)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, subscriber: Subscriber) -> None:
        """Serve a subscriber, with what is left of the piece that it stands in, if any."""
        self.follow(self._clock.monotonic())
        if self.tail.base and subscriber.seq < self.floor:  # joining what was new has pushed out what it needs
            subscriber.fall_behind()
            return
        super().add(subscriber)

    def follow(self, now: float) -> None:
        """Join what is new; begin anew when the source has dropped what was not joined yet."""
        source, merger, append = self.source, self._merger, self.tail.append
        if self._read < source.base:
            self.tail.restart(source.floor)
            self._frames.clear()
            merger = self._merger = Chunker(self._grain, Position(source.floor))
            self._read = source.base
        for entry in source.slice(self._read, source.end):
            for piece in merger.offer(entry, now):
                append(piece)
        self._read = source.end
        for piece in merger.settle(now):
            append(piece)
        if self._timer is None and merger.due is not None:
            self._timer = self._loop.call_later(max(0.0, merger.due - now), self._let_out)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _is_inside(self, subscriber: Subscriber) -> bool:
        index, base = subscriber.index, self.tail.base
        before = self.tail.slice(index - 1, index)[0] if index > base else None
        return before is None or (before.seq, before.offset) != subscriber.place

    def _let_out(self) -> None:
        self._timer = None
        metrics.WRITES.inc(self.flush(self._clock.monotonic()))


class Views:
    """The views of a feed: its own tail, and one for each granularity that somebody wants now."""

    def __init__(self, tail: Tail, at: Address, clock: Clock, max_bytes: int) -> None:
        self.tail = tail
        self._at = at
        self._clock = clock
        self._max_bytes = max_bytes
        self._views: dict[Granularity, View] = {TOKEN: View(tail, at, clock)}  # at most one for each `Grain` there is

    @property
    def size(self) -> int:
        """Bytes of all entries."""
        return sum(view.tail.bytes for view in self._views.values())

    def floor(self, subscriber: Subscriber) -> int:
        """Return the stream sequence from which on a subscriber can be served from memory."""
        view = self._views.get(subscriber.grain)
        return self.tail.floor if view is None else max(self.tail.floor, view.floor)

    def add(self, subscriber: Subscriber) -> None:
        """Serve a subscriber from memory; it must be at or above its floor."""
        view = self._views.get(subscriber.grain)
        if view is None:
            place, size = subscriber.place, self._max_bytes // _SHARE
            view = ChunkedView(self.tail, self._at, self._clock, subscriber.grain, place, size)
            self._views[subscriber.grain] = view
        view.waiting.discard(subscriber)
        view.add(subscriber)

    def hold(self, subscriber: Subscriber) -> None:
        """Serve a subscriber no more for now; what it is to stand in stays."""
        view = self._views.get(subscriber.grain)
        if view is not None:
            view.subscribers.discard(subscriber)
            view.waiting.add(subscriber)

    def remove(self, subscriber: Subscriber) -> None:
        """Serve a subscriber no more."""
        view = self._views.get(subscriber.grain)
        if view is None:
            return
        view.subscribers.discard(subscriber)
        view.waiting.discard(subscriber)
        if not view.subscribers and not view.waiting and subscriber.grain != TOKEN:
            view.close()
            del self._views[subscriber.grain]

    def flush(self) -> int:
        """Write what is new; return how many writes were begun."""
        now = self._clock.monotonic()
        return sum(view.flush(now) for view in tuple(self._views.values()))

    def close(self) -> None:
        """Stop all timers."""
        for view in self._views.values():
            view.close()
