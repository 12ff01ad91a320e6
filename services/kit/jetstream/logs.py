"""The state of the logs: their bounds, and whether one of them has lost its end."""

import asyncio
import secrets
import time
from typing import Final

import msgspec
import structlog
from prometheus_client import Counter

from schemas.log_marks import Mark, beyond, decode_mark, mark_subject, regression
from schemas.log_marks import incarnation as incarnation_of
from schemas.subjects import partition_filter
from schemas.topology import REGISTRY_BUCKET, bucket_stream, token_stream
from services.kit.jetstream.broker import Broker, BrokerUnavailable, StreamState
from services.kit.jetstream.connection import expecting
from services.kit.jetstream.errors import APIError

__all__ = ["Logs"]

log = structlog.get_logger()
REGRESSIONS: Final = Counter(
    "tailrace_log_regressions_total", "Times that a log had lost its end or been recreated", ["partition"]
)
LOST: Final = Counter("tailrace_log_lost_events_total", "Stream sequences that a log has lost", ["partition"])
COMPARE_SECONDS: Final = 5.0
"""Seconds between comparisons of the message at the mark; a new connection compares it at once."""
CONFIRM_SECONDS: Final = 15.0
"""Seconds for which a replicated log must look truncated: a new leader may answer before it has applied all messages.
"""
SUSPECTED: Final = 1_000
_TRIES: Final = 5


class Logs:
    """Read the state of logs, and maintain their marks. Every process has one instance for its connection."""

    def __init__(self, broker: Broker, *, confirm: float = CONFIRM_SECONDS) -> None:
        self._broker = broker
        self._confirm = confirm
        self._compared: dict[int, tuple[int, float, str]] = {}  # by partition: connection, time, incarnation
        self._suspected: dict[tuple[int, int], float] = {}  # first time a replicated log looked truncated, by its mark
        self._marking: dict[int, asyncio.Task[None]] = {}

    async def state(self, partition: int) -> StreamState:
        """Return bounds and incarnation of a partition's log.

        Raises:
            BrokerUnavailable: the broker does not answer, or a loss in a replicated log must be confirmed first.
        """
        for _ in range(_TRIES):
            # Read the mark first: if another process advances it meanwhile, it stays within the log's bounds.
            mark, revision = await self._mark(partition)
            state = await self._broker.state(token_stream(partition))
            if mark is None:
                if await self._write(partition, _at_end(Mark(created=state.created), state), revision):
                    return state
                continue
            reason = await self._regression(partition, mark, state)
            if reason is None:
                self._suspected.pop((partition, mark.seq), None)
                was_emptied = state.first_seq > mark.seq >= mark.first  # on purpose, while we were connected
                if state.last_seq > mark.seq or state.holes != mark.holes or was_emptied:
                    self._move_on(partition, _at_end(mark, state), revision)
                return _joined(state, mark)
            await self._confirmed(partition, mark, state, reason)
            await self._renew(partition, mark, revision, state, reason)
        raise BrokerUnavailable(f"the mark of {token_stream(partition)} keeps changing")

    async def report(self, partition: int, incarnation: str, seq: int, stamp: int = 0) -> None:
        """Begin a new era because the log no longer holds the message seen at ``seq``, stored at ``stamp``.

        ``stamp``: in nanoseconds since 1970, 0 if unknown.

        Nothing happens if another process has begun an era since ``incarnation``.

        Raises:
            BrokerUnavailable: the broker does not answer, or does not accept it.
        """
        mark, revision = await self._mark(partition)
        state = await self._broker.state(token_stream(partition))
        if mark is None:
            mark = Mark(created=state.created)
        if msgspec.structs.replace(state, era=mark.era).incarnation == incarnation:
            seen = msgspec.structs.replace(mark, seq=seq, stamp=stamp or mark.stamp)
            reason = f"a reader was at {seq}, or had read another message there"
            await self._confirmed(partition, seen, state, reason)
            await self._renew(partition, seen, revision, state, reason)

    async def repaired(self, partition: int, incarnation: str) -> None:
        """Record that the generations left open by a loss have been ended in this incarnation.

        Raises:
            BrokerUnavailable: the broker does not answer, or does not accept it.
        """
        for _ in range(_TRIES):
            mark, revision = await self._mark(partition)
            if mark is None or mark.repaired or incarnation_of(mark.created, mark.era) != incarnation:
                return
            if await self._write(partition, msgspec.structs.replace(mark, repaired=True), revision):
                return

    async def begin_era(self, partition: int) -> bool:
        """Begin a new era without evidence of a loss; return False for an empty log.

        For a possible loss: the store was restored from a copy, or the machine crashed.

        Raises:
            BrokerUnavailable: the broker does not answer, or does not accept it.
        """
        for _ in range(_TRIES):
            mark, revision = await self._mark(partition)
            state = await self._broker.state(token_stream(partition))
            if not state.last_seq:
                return False
            era, end = secrets.token_hex(4), state.last_seq
            begun = Mark(created=state.created, era=era, base=end, lost=end)
            if mark is not None and (reason := await self._regression(partition, mark, state)) is not None:
                await self._renew(partition, mark, revision, state, reason)
                return True
            if await self._write(partition, _at_end(begun, state), revision):
                log.warning("a new era of the log begins", partition=partition, ends_at=end)
                return True
        raise BrokerUnavailable(f"the mark of {token_stream(partition)} keeps changing")

    async def _regression(self, partition: int, mark: Mark, state: StreamState) -> str | None:
        known = self._compared.get(partition)
        connection, now = self._now()
        is_new = known is None or known[0] != connection
        stamp: int | None = None
        if mark.seq and self._is_to_compare(partition, mark, state):
            stamp = await self._broker.stamp(token_stream(partition), mark.seq)
        elif not is_new:
            return regression(mark, state.created, state.last_seq, stamp)
        self._compared[partition] = (connection, now, f"{mark.created} {mark.era}")
        reason = regression(mark, state.created, state.last_seq, stamp)
        # During a connection, messages disappear from the middle, or all at once, only by deliberate deletion.
        if reason is not None or not is_new or await self._broker.is_replicated(token_stream(partition)):
            return reason
        if state.holes > mark.holes:
            return f"{state.holes - mark.holes} messages are missing in its middle"
        age = time.time() - mark.stamp / 1e9
        if state.first_seq > mark.seq >= mark.first > 0 and (not state.max_age or age < state.max_age):
            return "all of its messages are gone"
        return None

    def _is_to_compare(self, partition: int, mark: Mark, state: StreamState) -> bool:
        if state.created != mark.created or state.last_seq < mark.seq:
            return False
        if state.last_seq == mark.seq:
            return state.last_stamp != mark.stamp
        connection, now = self._now()
        known = self._compared.get(partition)
        if known is None or known[0] != connection or known[2] != f"{mark.created} {mark.era}":
            return True
        return now - known[1] > COMPARE_SECONDS

    def _now(self) -> tuple[int, float]:
        return self._broker.reconnects, asyncio.get_running_loop().time()

    async def _confirmed(self, partition: int, mark: Mark, state: StreamState, reason: str) -> None:
        """Require that a replicated log looks truncated for some time before a loss is accepted.

        Raises:
            BrokerUnavailable: it is not confirmed yet.
        """
        if state.created != mark.created or state.last_seq >= mark.seq:
            return
        if not await self._broker.is_replicated(token_stream(partition)):
            return
        now = asyncio.get_running_loop().time()
        if len(self._suspected) > SUSPECTED:
            self._suspected.clear()
        since = self._suspected.setdefault((partition, mark.seq), now)
        if now - since < self._confirm:
            raise BrokerUnavailable(f"{token_stream(partition)}: the loss is not confirmed yet: {reason}")

    async def _renew(self, partition: int, mark: Mark, revision: int, state: StreamState, reason: str) -> None:
        """Write the mark of a new era, unless another process was faster."""
        base, reused = await self._base(partition, mark, state)
        era = secrets.token_hex(4) if state.created == mark.created else ""
        renewed = _at_end(Mark(created=state.created, era=era, base=base, lost=mark.seq, reused=reused), state)
        if not await self._write(partition, renewed, revision):
            return
        self._suspected.clear()
        if mark.seq == 0:
            return  # nothing had been stored
        REGRESSIONS.labels(str(partition)).inc()
        missing = state.holes - mark.holes if state.first_seq <= mark.seq else mark.seq - mark.first + 1
        LOST.labels(str(partition)).inc(mark.seq - base if reused else max(0, missing))
        log.error(
            "the log has lost its end",
            partition=partition,
            reason=reason,
            kept_up_to=base,
            lost_up_to=mark.seq,
            ends_at=state.last_seq,
        )

    async def _base(self, partition: int, mark: Mark, state: StreamState) -> tuple[int, bool]:
        """Return the last unchanged sequence, and whether later sequences are reused for other messages."""
        stream, filter_ = token_stream(partition), partition_filter(partition)
        if not mark.seq or not mark.stamp or not state.last_seq:
            return 0, True
        if mark.seq <= state.last_seq and state.first_seq <= mark.seq:
            stamp = await self._broker.stamp(stream, mark.seq)
            if stamp == mark.stamp or (stamp is None and state.created == mark.created):
                hole = await self._broker.first_hole(stream, filter_, state.first_seq, mark.seq)
                return hole - 1, False
        if state.first_seq > mark.seq and state.created == mark.created:
            return 0, False  # all old messages are gone, and new ones follow their sequences
        later = await self._broker.first_since(stream, filter_, mark.stamp + 1)
        return beyond(mark, state.last_seq, later), True

    async def _mark(self, partition: int) -> tuple[Mark | None, int]:
        stored = await self._broker.last(bucket_stream(REGISTRY_BUCKET), mark_subject(partition))
        return (None, 0) if stored is None else (decode_mark(stored.data), stored.seq)

    def _move_on(self, partition: int, mark: Mark, revision: int) -> None:
        """Write a mark in the background; a lost or outdated one is written the next time."""
        if partition in self._marking:
            return

        async def write() -> None:
            try:
                await self._write(partition, mark, revision)
            except BrokerUnavailable as error:
                log.warning("log mark not advanced", partition=partition, detail=str(error))
            finally:
                del self._marking[partition]

        self._marking[partition] = asyncio.create_task(write())

    async def _write(self, partition: int, mark: Mark, revision: int) -> bool:
        """Store a mark after ``revision``; return False if another process has stored one since."""
        headers = expecting(revision)
        try:
            await self._broker.publish_stored(mark_subject(partition), msgspec.json.encode(mark), headers=headers)
        except APIError as error:
            if error.is_wrong_last_sequence:
                return False
            raise BrokerUnavailable(f"the mark of a log is refused: {error.description}") from error
        return True


def _joined(state: StreamState, mark: Mark) -> StreamState:
    return msgspec.structs.replace(
        state,
        era=mark.era,
        base=mark.base,
        lost=mark.lost,
        reused=mark.reused,
        repaired=mark.repaired or not mark.lost,
    )


def _at_end(mark: Mark, state: StreamState) -> Mark:
    stamp = state.last_stamp if state.last_seq else 0
    return msgspec.structs.replace(mark, seq=state.last_seq, stamp=stamp, first=state.first_seq, holes=state.holes)
