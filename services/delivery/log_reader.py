"""Reads accepted events of one session from the log."""

from collections.abc import AsyncIterator
from typing import Final

import structlog

from schemas.acceptance import BEGINNING, Position, Verdict, joining, judge
from schemas.codec import Header, MalformedEvent, decode_header
from schemas.subjects import log_filter
from schemas.topology import token_stream
from services.delivery import metrics
from services.delivery.core.entries import Entry, Positions
from services.delivery.shared_reads import LogKey, SharedReads
from services.kit.broker import Broker, Stored

__all__ = ["LogReader"]

log = structlog.get_logger()
_SEEN: Final = {verdict: metrics.EVENTS_IN.labels(verdict.value) for verdict in Verdict}


class LogReader:
    """Reads accepted events of one session, or of one generation of it, from the log.

    Where reading begins in the middle of a generation, that generation's own log is folded up to there first, so that
    repeats and zombies are told apart exactly. With ``shared`` what is read is kept for others that read it soon, of
    the stream's ``incarnation``.
    """

    def __init__(
        self,
        broker: Broker,
        partition: int,
        tenant: str,
        session: str,
        shared: SharedReads | None = None,
        incarnation: str = "",
    ) -> None:
        self.broker = broker
        self._shared = shared
        self._incarnation = incarnation
        self.stream = token_stream(partition)
        self.positions = Positions()
        self.headless: set[str] = set()  # generations whose beginning the log no longer keeps; bounded by what it keeps
        self._partition = partition
        self._tenant = tenant
        self._session = session
        self.filter = self.subject("*")

    def subject(self, generation: str) -> str:
        """Return the log's subject of one generation (``*``: of all)."""
        return log_filter(self._partition, self._tenant, self._session, generation)

    async def first_of(self, generation: str) -> int | None:
        """Return the stream sequence of a generation's first stored message."""
        stored = await self.broker.first(self.stream, self.subject(generation))
        return stored.seq if stored else None

    async def accept(self, stored: Stored) -> Entry | None:
        """Return the entry for a stored message, or ``None`` when the acceptance rule drops it."""
        try:
            header = decode_header(stored.data)
        except MalformedEvent as error:
            metrics.EVENTS_IN.labels("malformed").inc()
            log.warning("malformed event in the log", seq=stored.seq, detail=str(error))
            return None
        if not self.positions.knows(header.generation):
            position = await self.position_before(header.generation, stored.seq)
            if position is BEGINNING and header.seq > 0:
                position = joining(header.epoch, header.seq)
                self.headless.add(header.generation)
            self.positions.begin(header.generation, position)
        return self.judge(header, stored)

    def judge(self, header: Header, stored: Stored) -> Entry | None:
        """Apply the rule to an event of a generation whose position is known."""
        verdict = self.positions.offer(header)
        _SEEN[verdict].inc()
        if verdict is not Verdict.ACCEPTED:
            return None
        return Entry(stored.seq, header.generation, header.type, stored.data)

    async def position_before(self, generation: str, seq: int) -> Position:
        """Return the position in a generation before the message with stream sequence ``seq``."""
        if seq <= 1:
            return BEGINNING
        subject = self.subject(generation)
        at, position = self._known(subject, seq)
        async for batch in self.read(subject, at, seq - 1):
            known_at, known = self._known(subject, batch[-1].seq + 1)
            if known_at > at:  # another one has come further meanwhile
                at, position = known_at, known
            for stored in batch:
                if stored.seq >= at:
                    position = _after(position, stored)
            at = batch[-1].seq + 1
            self._keep(subject, at, position)
        self._keep(subject, seq, position)
        return position

    def read(self, filter_: str, from_seq: int, up_to: int) -> AsyncIterator[list[Stored]]:
        """Yield what is stored from one stream sequence to another, in order and in batches.

        Raises:
            BrokerUnavailable: the log cannot be read.
        """
        if self._shared is None:
            return self.broker.read(self.stream, filter_, from_seq, up_to=up_to)
        return self._shared.read(self._key(filter_), from_seq, up_to)

    def _key(self, filter_: str) -> LogKey:
        return LogKey(self.stream, self._incarnation, filter_)

    def _known(self, subject: str, seq: int) -> tuple[int, Position]:
        return (1, BEGINNING) if self._shared is None else self._shared.position(self._key(subject), seq)

    def _keep(self, subject: str, seq: int, position: Position) -> None:
        if self._shared is not None:
            self._shared.note(self._key(subject), seq, position)


def _after(position: Position, stored: Stored) -> Position:
    try:
        header = decode_header(stored.data)
    except MalformedEvent:
        return position
    if position is BEGINNING and header.seq > 0:
        position = joining(header.epoch, header.seq)
    return judge(position, header.type, header.epoch, header.seq)[0]
