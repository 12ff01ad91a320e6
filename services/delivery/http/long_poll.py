"""Serve long polls: a batch of events as soon as one exists, for clients that cannot stream."""

import asyncio
from typing import Any, Final

import msgspec
from litestar.types import ASGIApp

from schemas.codec import decode_header
from services.delivery.fanout.streams import Stream, Streams
from services.delivery.fanout.subscriber import Subscriber
from services.delivery.formats.format import Address
from services.delivery.formats.granularity import TOKEN, Chunker, Position
from services.delivery.formats.raw import RawBye, RawFormat, RawGap, raw_event_of
from services.delivery.formats.tail import Entry
from services.delivery.http.asgi import send_whole, watching
from services.kit.problem import Problem, send_problem

__all__ = ["BATCH_EVENTS", "MAX_EVENTS", "EventBatch", "polling"]

BATCH_EVENTS: Final = 500
MAX_EVENTS: Final = 5_000
BATCH_BYTES: Final = 1_048_576
GATHER_SECONDS: Final = 0.005  # wait for events that directly follow the first one
_FORMAT: Final = RawFormat("poll")


class _Item(msgspec.Struct):
    cursor: str
    event: msgspec.Raw


class EventBatch(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The result of a poll. ``cursor``: pass it as ``after`` in the next poll; ``more``: more events are available.

    ``ended``: the requested generation has ended, no event follows. ``gaps``: missing events, as on a stream.
    """

    events: list[_Item]
    cursor: str
    more: bool
    ended: bool | None = None
    gaps: list[dict[str, str]] = []


class _Poll:
    """Collect one batch of at most ``limit`` events; ``wait``: seconds to wait for the first one."""

    def __init__(self, wait: float, limit: int) -> None:
        self.gaps: list[RawGap] = []
        self.frames: list[bytes] = []
        self.subscriber: Subscriber | None = None
        self._wait = wait
        self._limit = limit
        self._size = 0
        self._caught_up = False
        self._loop = asyncio.get_running_loop()
        self._timers: list[asyncio.TimerHandle] = []

    def joined(self, subscriber: Subscriber) -> None:
        self.subscriber = subscriber
        subscriber.limit(self._limit, BATCH_BYTES)
        if self._wait:
            self._end_in(self._wait)

    def caught_up(self, _subscriber: Subscriber) -> None:
        self._caught_up = True
        if not self._wait:
            self._end_in(0)
        elif self.frames:
            self._end_in(GATHER_SECONDS)

    async def send(self, message: list[bytes]) -> None:
        before = len(self.frames)
        for frame in message:
            if isinstance(frame, RawGap):
                self.gaps.append(frame)
            elif not isinstance(frame, RawBye):
                self.frames.append(frame)
                self._size += len(frame)
        if len(self.frames) >= self._limit or self._size >= BATCH_BYTES:
            self._end_in(0)
        elif self._caught_up and self.frames and not before:
            self._end_in(GATHER_SECONDS)

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()

    def _end_in(self, seconds: float) -> None:
        assert self.subscriber is not None
        if seconds:
            self._timers.append(self._loop.call_later(seconds, self.subscriber.stop, "batch"))
        else:
            self.subscriber.stop("batch")


def polling(streams: Streams, stream: Stream, wait: float, limit: int, *, gzip: bool = False) -> ASGIApp:
    """Return the ASGI application that waits ``wait`` seconds for a batch of at most ``limit`` events."""

    async def answer(_scope: Any, receive: Any, send: Any) -> None:
        if stream.seq is None:
            await _send(send, EventBatch(events=[], cursor=stream.options.cursor or "", more=False, ended=True))
            return
        # Read single tokens: the granularity is applied to the complete batch, where no text is held back.
        plain = stream._replace(options=stream.options._replace(granularity=TOKEN), offset=0)
        poll = _Poll(wait, limit)
        with watching(receive) as watch:

            def joined(subscriber: Subscriber) -> None:
                poll.joined(subscriber)
                watch(subscriber)

            try:
                reason = await streams.serve(plain, poll.send, _FORMAT, joined, poll.caught_up)
            finally:
                poll.close()
        if reason == "unavailable" and not poll.frames:
            problem = Problem(503, "the log cannot be read now", headers={"Retry-After": "1"})
            await send_problem(send, problem)
        elif reason != "disconnected":
            await _send(send, _batch(stream, poll, reason), gzip=gzip)

    return answer


def _batch(stream: Stream, poll: _Poll, reason: str) -> EventBatch:
    assert poll.subscriber is not None
    assert stream.seq is not None
    feed, position = stream.feed, max(poll.subscriber.position, Position(stream.seq, stream.offset))
    ended = reason in ("terminal", "complete")
    behind = position.seq < feed.tail.floor or feed.tail.after(*position) < feed.tail.end
    return EventBatch(
        events=_items(stream, poll.frames),
        cursor=feed.address.inside(position.offset).cursor(position.seq).decode(),
        more=behind and not ended,
        ended=True if ended else None,
        gaps=[dict(zip(("reason", "generation"), gap.decode().split(), strict=False)) for gap in poll.gaps],
    )


def _items(stream: Stream, frames: list[bytes]) -> list[_Item]:
    at, seq = stream.feed.address, stream.seq or 0
    chunker = Chunker(stream.options.granularity, Position(seq, stream.offset))
    entries: list[Entry] = []
    for frame in frames:
        entries += chunker.offer(_entry(frame), 0.0)
    return [_item(entry, at) for entry in [*entries, *chunker.release()]]


def _entry(frame: bytes) -> Entry:
    part = raw_event_of(frame)
    header = decode_header(part.data)
    return Entry(part.seq, header.generation, header.type, part.data, part.offset, part.moved)


def _item(entry: Entry, at: Address) -> _Item:
    return _Item(at.after(entry).decode(), msgspec.Raw(entry.data))


async def _send(send: Any, batch: EventBatch, *, gzip: bool = False) -> None:
    await send_whole(send, 200, msgspec.json.encode(batch), "application/json", gzip=gzip)
