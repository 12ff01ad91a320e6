"""Reads accepted events of one session from the log."""

from typing import Final

import structlog

from schemas.acceptance import BEGINNING, Position, Verdict, joining, judge
from schemas.codec import Header, MalformedEvent, decode_header
from schemas.subjects import log_filter
from schemas.topology import token_stream
from services.delivery import metrics
from services.delivery.core.entries import Entry, Positions
from services.kit.broker import Broker, Stored

__all__ = ["LogReader"]

log = structlog.get_logger()
_SEEN: Final = {verdict: metrics.EVENTS_IN.labels(verdict.value) for verdict in Verdict}


class LogReader:
    """Reads accepted events of one session, or of one generation of it, from the log.

    Where reading begins in the middle of a generation, that generation's own log is folded up to there first, so that
    repeats and zombies are told apart exactly.
    """

    def __init__(self, broker: Broker, partition: int, tenant: str, session: str) -> None:
        self.broker = broker
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
        position = BEGINNING
        if seq <= 1:
            return position
        async for batch in self.broker.read(self.stream, self.subject(generation), up_to=seq - 1):
            for stored in batch:
                try:
                    header = decode_header(stored.data)
                except MalformedEvent:
                    continue
                if position is BEGINNING and header.seq > 0:
                    position = joining(header.epoch, header.seq)
                position, _ = judge(position, header.type, header.epoch, header.seq)
        return position
