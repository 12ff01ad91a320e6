"""Serve one subscriber: track its position in a feed and write to its connection without a dedicated task."""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterator
from enum import Enum
from typing import Any, Final

from services.delivery import metrics
from services.delivery.formats.format import Format
from services.delivery.formats.frames import UNLIMITED, Chunk
from services.delivery.formats.granularity import TOKEN, Granularity, Position

__all__ = ["Send", "Progress", "State", "Subscriber"]

Send = Callable[[Any], Awaitable[None]]
"""Sends a message. An optional attribute ``offer``, a plain function, sends one at once or returns False."""

MET: Final = 256
"""Bound of generations in `Subscriber.met`; beyond it the subscriber is counted again."""


class State(Enum):
    """Lifecycle state of a subscriber.

    ``FROM_LOG``: served from the log. ``LIVE``: served from the feed's memory and with new events. ``BLOCKED``: a write
    waits for the client; the state before it follows. ``OVER``: the stream ends.
    """

    FROM_LOG = "from_log"
    LIVE = "live"
    BLOCKED = "blocked"
    OVER = "over"


TRANSITIONS: Final = {
    State.FROM_LOG: frozenset({State.LIVE, State.BLOCKED, State.OVER}),
    State.LIVE: frozenset({State.FROM_LOG, State.BLOCKED, State.OVER}),
    State.BLOCKED: frozenset({State.FROM_LOG, State.LIVE, State.OVER}),
    State.OVER: frozenset[State](),
}
"""The legal transitions; a transition to the same state is always legal."""


class Progress:
    """Record how far a subscriber has been served; subscribers at the same point share one object.

    ``index``: the next entry of the feed's tail; ``seq``: the stream sequence up to which it was served, ``offset``:
    characters of the next event; ``at``: time of the last write (event-loop time).
    """

    __slots__ = ("at", "index", "offset", "seq")

    def __init__(self, index: int, seq: int, offset: int, at: float) -> None:
        self.index = index
        self.seq = seq
        self.offset = offset
        self.at = at


class _Rest:
    """Await the rest of an awaitable that was started by hand and waits for ``future``."""

    def __init__(self, steps: Iterator[Any], future: Any) -> None:
        self._steps = steps
        self._future = future

    def __await__(self) -> Generator[Any, Any, None]:
        future = self._future
        while True:
            try:
                yield future
            except BaseException:  # cancelled: close the write instead of leaving it half done
                close = getattr(self._steps, "close", None)
                if close is not None:
                    close()
                raise
            try:
                future = next(self._steps)
            except StopIteration:
                return


class Subscriber:
    """Serve one client that reads a session (``generation`` is None) or one generation.

    ``progress``: its progress. `Feed.serve` owns its `state`. ``quick``: it is live, at the edge of a piece and without
    credit, so flushes take the fast path. ``done`` resolves with the reason when the stream ends, or with ``behind``
    when it must read from the log again; ``until`` (monotonic seconds) and ``until_reason``: deadline of the stream and
    its reason; ``heartbeat``: seconds without a write after which a heartbeat is sent. A write that has to wait becomes
    a task; meanwhile the subscriber only falls behind, and later gets the missed events in few writes.

    ``granularity``: its granularity; ``joining``: its position may be inside the entry at its index.

    ``room`` and ``space``: credit in events and bytes, if the client grants any; the last event may exceed ``space``.
    """

    __slots__ = (
        "_after",
        "_blocked",
        "_joining",
        "_live",
        "_loop",
        "_roomy",
        "_send",
        "_state",
        "_wake",
        "accounted",
        "blocked_at",
        "done",
        "format",
        "generation",
        "granularity",
        "heartbeat",
        "met",
        "offer",
        "progress",
        "quick",
        "room",
        "space",
        "until",
        "until_reason",
    )

    def __init__(
        self,
        send: Send,
        format_: Format,
        generation: str | None,
        seq: int,
        offset: int = 0,
        granularity: Granularity = TOKEN,
    ) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self.format = format_
        self.generation = generation
        self.progress = Progress(0, seq, offset, loop.time())
        self.quick = False
        self.offer: Callable[[Any], bool] | None = getattr(send, "offer", None)
        self.granularity = granularity
        self._state = State.FROM_LOG
        self._live = False  # live now, or again after `BLOCKED`
        self._joining = False
        self.done: asyncio.Future[str] = loop.create_future()
        self.until = float("inf")
        self.until_reason = "lifetime"
        self.heartbeat = float("inf")
        self.room = UNLIMITED
        self.space = UNLIMITED
        self.accounted = seq  # counted for billing up to this stream sequence
        self.met: set[str] | None = None  # generations that have counted it as a subscriber
        self._send = send
        self.blocked_at: float | None = None
        self._blocked: asyncio.Task[None] | None = None
        self._wake: Callable[[Subscriber], None] | None = None
        self._roomy: asyncio.Event | None = None
        self._after: str | None = None

    @property
    def ready(self) -> bool:
        """Whether a write can be started now."""
        return self._blocked is None and self.room > 0 and self.space > 0 and not self.done.done()

    @property
    def state(self) -> State:
        """The lifecycle state."""
        return self._state

    @property
    def joined(self) -> bool:
        """Whether it is served by a view, blocked or not."""
        return self._live

    def move(self, state: State) -> None:
        """Move to another state.

        Raises:
            RuntimeError: `TRANSITIONS` does not allow it.
        """
        if state is not self._state and state not in TRANSITIONS[self._state]:
            raise RuntimeError(f"a subscriber cannot move from {self._state.value} to {state.value}")
        if state is not State.BLOCKED:
            self._live = state is State.LIVE
            if self._blocked is not None and state is not State.OVER:
                state = State.BLOCKED  # the write still waits; the new state follows it
        self._state = state
        self._refresh()

    @property
    def joining(self) -> bool:
        """Whether its position may be inside the entry at its index."""
        return self._joining

    @joining.setter
    def joining(self, joining: bool) -> None:
        self._joining = joining
        self._refresh()

    @property
    def index(self) -> int:
        """Index of the next entry of the feed's tail to send."""
        return self.progress.index

    @index.setter
    def index(self, index: int) -> None:
        self.progress = Progress(index, self.progress.seq, self.progress.offset, self.progress.at)

    @property
    def seq(self) -> int:
        """The stream sequence up to which it has been served."""
        return self.progress.seq

    @property
    def offset(self) -> int:
        """Characters already served of the event after `seq`."""
        return self.progress.offset

    @property
    def position(self) -> Position:
        """The position up to which it has been served."""
        return Position(self.progress.seq, self.progress.offset)

    @position.setter
    def position(self, position: Position) -> None:
        self.progress = Progress(self.progress.index, position.seq, position.offset, self.progress.at)

    def touch(self, now: float) -> None:
        """Record a write other than events at ``now``."""
        self.progress = Progress(self.progress.index, self.progress.seq, self.progress.offset, now)

    def _refresh(self) -> None:
        """Recompute `quick`."""
        self.quick = (
            self._state is State.LIVE
            and not self._joining
            and self.room == UNLIMITED
            and self.space == UNLIMITED
            and not self.done.done()
        )

    def meets(self, generation: str) -> bool:
        """Return whether this is the first count for the generation, and remember it."""
        met = self.met
        if met is None:
            self.met = {generation}
            return True
        if generation in met:
            return False
        if len(met) >= MET:
            met.clear()
        met.add(generation)
        return True

    def on_ready(self, wake: Callable[["Subscriber"], None]) -> None:
        """Call ``wake`` whenever a waiting write has completed or new credit allows a write."""
        self._wake = wake

    def deliver(self, chunk: Chunk, progress: Progress | None = None) -> None:
        """Start to write a chunk; it completes at once unless the client's buffers are full.

        ``progress``: progress of another subscriber after the same chunk, to share.
        """
        self.progress = progress or self.behind(chunk)
        if chunk.message is not None:
            self.count(chunk.count, chunk.size)
            self.start(chunk.message)
        if chunk.ends:
            self.stop("terminal")

    def behind(self, chunk: Chunk) -> Progress:
        """Return the progress after a chunk."""
        before, now = self.progress, self._loop.time()
        if chunk.last_seq:
            return Progress(chunk.stop, chunk.last_seq, chunk.offset, now)
        return Progress(chunk.stop, before.seq, before.offset, now)

    def count(self, events: int, size: int) -> None:
        """Subtract sent events and bytes from the client's credit."""
        metrics.EVENTS_OUT.inc(events)
        if self.room != UNLIMITED:
            self.room -= events
        if self.space != UNLIMITED:
            self.space -= size

    def limit(self, room: int, space: int) -> None:
        """Set the credit in events and bytes; resume a subscriber that waited for credit."""
        self.room, self.space = room, space
        self._refresh()
        if self._roomy is not None:
            self._roomy.set()
        if self.ready and self.joined and self._wake is not None:
            self._wake(self)

    async def has_room(self) -> None:
        """Wait until there is credit or the stream ends."""
        self._roomy = self._roomy or asyncio.Event()
        while not (self.room > 0 and self.space > 0) and not self.done.done():
            self._roomy.clear()
            waiting = asyncio.ensure_future(self._roomy.wait())
            try:
                either: set[asyncio.Future[Any]] = {waiting, self.done}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()

    def start(self, message: Any) -> None:
        """Start to send a message. Must not be called while another write waits."""
        # Without waiting: a synchronous offer, or a first step that finishes the send.
        offer = self.offer
        if offer is not None and offer(message):
            return
        try:
            steps = iter(self._send(message).__await__())
            future = next(steps)
        except StopIteration:
            return
        except (OSError, RuntimeError):
            self.stop("disconnected")
            return
        # The client's buffers are full: continue the same send in a task.
        metrics.BLOCKED.inc()
        self.blocked_at = self._loop.time()
        self._blocked = self._loop.create_task(self._wait(_Rest(steps, future)))
        if self._state is not State.OVER:
            self.move(State.BLOCKED)

    async def send(self, message: Any) -> None:
        """Send a message and wait until it is written or the stream ends; used while catching up."""
        self.start(message)
        if self._blocked is not None:
            either: set[asyncio.Future[Any]] = {self._blocked, self.done}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)

    def fall_behind(self) -> None:
        """Switch to reading from the log, because memory no longer keeps the next entry."""
        if not self.done.done():
            self.done.set_result("behind")
            self.move(State.FROM_LOG)

    def stop(self, reason: str) -> None:
        """End the stream; the first reason holds (``behind`` is not an end)."""
        if self._state is State.OVER:
            return
        if not self.done.done():
            self.done.set_result(reason)
        elif self._after is None:
            self._after = reason
        self.move(State.OVER)

    def rearm(self) -> None:
        """Reset ``done`` after falling behind; it resolves at once if the stream was stopped meanwhile."""
        if self.done.done() and not self.done.cancelled() and self.done.result() == "behind":
            self.done = self._loop.create_future()
            if self._after is not None:
                self.done.set_result(self._after)
            self._refresh()

    def poll(self, now: float) -> None:
        """Send a heartbeat when nothing was sent for ``heartbeat`` seconds."""
        if self._blocked is None and now - self.progress.at > self.heartbeat and not self.done.done():
            self.touch(now)
            heartbeat = self.format.heartbeat()
            if heartbeat is not None:
                self.start(heartbeat)

    async def close(self) -> None:
        """Cancel a write that still waits."""
        if self._blocked is not None:
            self._blocked.cancel()
            await asyncio.gather(self._blocked, return_exceptions=True)

    async def through(self, seconds: float) -> bool:
        """Wait at most ``seconds`` for a waiting write; return whether it has completed."""
        if self._blocked is not None:
            await asyncio.wait({self._blocked}, timeout=seconds)
        return self._blocked is None

    async def _wait(self, rest: _Rest) -> None:
        try:
            await rest
        except (OSError, RuntimeError):
            self.stop("disconnected")
        finally:
            self._blocked = None
            self.blocked_at = None
            if self._state is State.BLOCKED:
                self.move(State.LIVE if self._live else State.FROM_LOG)
        if self._wake is not None and not self.done.done():
            self._wake(self)
