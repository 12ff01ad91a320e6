"""The journal of a generation: append its events in order, keep its look-up record, count metrics."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import msgspec
import structlog

from schemas.acceptance import Position
from schemas.codec import encode_event
from schemas.events import AnyEvent, is_terminal, type_of
from schemas.requests import GenerationRecord
from services.kit.clock import Clock
from services.producer import metrics
from services.producer.adapters.publisher import LogWriter
from services.producer.adapters.records import Records
from services.producer.core.generation import Generation
from services.producer.core.takeover import Begun
from services.producer.errors import LogRefused

__all__ = ["Journal"]

log = structlog.get_logger()
FEW: Final = 2
"""Events sent at once when they are large, as those of an image; the next ones wait until these are stored."""
LARGE_BYTES: Final = 1024 * 1024
"""Unacknowledged bytes at which the next events wait; the client refuses more than 2 MB of unwritten data."""


class Journal:
    """Append the events of a `Generation`. The first append is conditional on ``last_seq``, and acknowledged.

    ``read`` reads the generation's events from the log.

    Events enter the writer's window before an interruption can reach the caller, so that no seq is ever missing.
    """

    def __init__(
        self,
        generation: Generation,
        writer: LogWriter,
        records: Records,
        record: GenerationRecord,
        clock: Clock,
        last_seq: int,
        read: Callable[[], Awaitable[Begun]],
    ) -> None:
        self.generation = generation
        self.record = record
        self._writer = writer
        self._records = records
        self._clock = clock
        self._last_seq: int | None = last_seq
        self._next_seq = generation.next_seq  # of the next event that the writer gets
        self._read = read

    @property
    def acknowledged(self) -> int:
        """Return the seq below which the log has acknowledged all events."""
        return self._next_seq - self._writer.unacknowledged

    def now(self) -> float:
        """Return the time to stamp events with, in seconds since 1970."""
        return int(self._clock.wall() * 1e6) / 1e6  # `round` costs five times as much

    async def append(self, events: list[AnyEvent]) -> None:
        """Append events; wait only for the first append of all, and while the window is full.

        Raises:
            LogRefused: another producer has written since the log was read.
            LogUnavailable: the log accepts no events.
            Fenced: the lease is lost, or expired before the first append.
        """
        if not events:
            return
        # The first append is conditional: another producer may have taken the generation over.
        if self._last_seq is not None:
            last_seq, self._last_seq = self._last_seq, None
            first, *events = events
            try:
                await _uninterrupted(self._writer.publish_first(encode_event(first), last_seq))
            except asyncio.CancelledError:
                self._enqueue(events)
                raise
            self._appended([first])
        # Built events have their seq: they must enter the window even after a cancellation, or a gap would remain.
        while len(events) > FEW:
            few, events = events[:FEW], events[FEW:]
            self._enqueue(few)
            try:
                await self._writer.room(LARGE_BYTES)
            except asyncio.CancelledError:
                self._enqueue(events)
                raise
        self._enqueue(events)
        await self._writer.room()

    async def confirm(self) -> None:
        """Wait until all events are stored, and make the next append, the first of a new epoch, conditional on that.

        Raises:
            LogRefused: another producer has written since.
            TryAgain: the log accepts no events, or cannot be read.
            BrokerUnavailable: the log cannot be read.
            Fenced: the lease is lost.
        """
        await self._writer.drain()
        begun = await self._read()
        if begun.position != Position(self.generation.epoch, self.generation.next_seq):
            raise LogRefused(f"generation {self.generation.name} is at {begun.position}: another producer has written")
        self._last_seq = begun.last_seq

    def append_aside(self, events: list[AnyEvent]) -> None:
        """Append from another task while the generation's own task waits for its provider."""
        if self._last_seq is None:
            self._enqueue(events)

    def update_record(self, **changes: object) -> None:
        """Change the look-up record; it is stored soon."""
        self.record = msgspec.structs.replace(self.record, **changes)
        self._records.put(self.record)

    def _enqueue(self, events: list[AnyEvent]) -> None:
        if events:
            self._writer.enqueue([encode_event(event) for event in events])
            self._appended(events)

    def _appended(self, events: list[AnyEvent]) -> None:
        self._next_seq += len(events)
        metrics.EVENTS.inc(len(events))
        if is_terminal(events[-1]):  # a terminal is always the last event of a batch
            self._end(events[-1])

    def _end(self, event: AnyEvent) -> None:
        kind, code = type_of(event), getattr(event, "code", None)
        counted = getattr(event, "counted", None)
        tokens = counted.output if counted else 0
        metrics.ENDED.labels(kind, code or "").inc()
        metrics.TOKENS.inc(tokens)
        self.update_record(
            state=kind,
            ended_at=event.at,
            code=code,
            finish_reason=getattr(event, "finish_reason", None),
            counted=counted,
            usage=self.generation.usage,
            upstream_model=self.generation.upstream_model or self.record.upstream_model,
        )
        log.info(
            "generation ended",
            session=self.record.session,
            generation=self.record.generation,
            terminal=kind,
            code=code,
            tokens=tokens,
        )


async def _uninterrupted(append: Coroutine[Any, Any, None]) -> None:
    """Finish an append whose outcome must be known, even if the caller is cancelled meanwhile; then propagate that."""
    task = asyncio.create_task(append)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()
        raise
