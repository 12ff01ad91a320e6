"""Read accepted events of one session from the log."""

from collections.abc import AsyncIterator
from typing import Final

import structlog

from schemas.acceptance import Acceptance, Verdict
from schemas.codec import Header, MalformedEvent, decode_header
from schemas.subjects import log_filter
from schemas.topology import token_stream
from services.delivery import metrics
from services.delivery.formats.tail import Entry, Positions
from services.delivery.log.read_cache import LogKey, ReadCache
from services.kit.jetstream.broker import Broker, Stored
from services.kit.jetstream.kept import highest_kept_epoch, keeps

__all__ = ["LogReader"]

log = structlog.get_logger()
_SEEN: Final = {verdict: metrics.EVENTS_IN.labels(verdict.value) for verdict in Verdict}


class LogReader:
    """Read accepted events of one session, or of one generation of it, from the log.

    When reading begins inside a generation, its earlier events are folded first, so that repeats and zombies are
    detected exactly. When events of it have expired, it is joined at the highest epoch that the log keeps, and the
    entry is marked (`Entry.gap`). ``shared``: cache of reads of the stream's ``incarnation``.
    """

    def __init__(
        self,
        broker: Broker,
        partition: int,
        tenant: str,
        session: str,
        shared: ReadCache | None = None,
        incarnation: str = "",
    ) -> None:
        self.broker = broker
        self._shared = shared
        self._incarnation = incarnation
        self.stream = token_stream(partition)
        self.positions = Positions()
        self._partition = partition
        self._tenant = tenant
        self._session = session
        self.filter = self.subject("*")

    def subject(self, generation: str) -> str:
        """Return the log's subject of one generation (``*``: all generations)."""
        return log_filter(self._partition, self._tenant, self._session, generation)

    async def first_of(self, generation: str) -> int | None:
        """Return the stream sequence of a generation's first stored message."""
        stored = await self.broker.first(self.stream, self.subject(generation))
        return stored.seq if stored else None

    async def accept(self, stored: Stored) -> Entry | None:
        """Return the entry for a stored message, or ``None`` when the acceptance rule drops it.

        Raises:
            BrokerUnavailable: the log cannot be read.
        """
        try:
            header = decode_header(stored.data)
        except MalformedEvent as error:
            metrics.EVENTS_IN.labels("malformed").inc()
            log.warning("malformed event in the log", seq=stored.seq, detail=str(error))
            return None
        if not self.positions.knows(header.generation):
            self.positions.begin(header.generation, await self.before(header.generation, stored.seq))
        acceptance = self.positions.of(header.generation)
        return self._entry(await self._offer(acceptance, header, stored.seq), acceptance, header, stored)

    def judge(self, header: Header, stored: Stored) -> Entry | None:
        """Apply the acceptance rule to an event with no missing predecessor in its generation."""
        acceptance = self.positions.of(header.generation)
        return self._entry(acceptance.offer(header, stored.seq), acceptance, header, stored)

    def begins_late(self, header: Header) -> bool:
        """Return whether the first event read of a generation was dropped because earlier ones have expired."""
        acceptance = self.positions.of(header.generation)
        return not acceptance.begun and acceptance.lacks(header)

    async def before(self, generation: str, seq: int) -> Acceptance:
        """Return the acceptance state of a generation before the stream sequence ``seq``.

        Raises:
            BrokerUnavailable: the log cannot be read.
        """
        if seq <= 1:
            return Acceptance()
        subject = self.subject(generation)
        at, acceptance = self._known(subject, seq)
        async for batch in self.read(subject, at, seq - 1):
            known_at, known = self._known(subject, batch[-1].seq + 1)
            if known_at > at:  # another reader is further ahead
                at, acceptance = known_at, known
            for stored in batch:
                if stored.seq >= at:
                    await self._fold(acceptance, stored)
            at = batch[-1].seq + 1
            self._keep(subject, at, acceptance)
        self._keep(subject, seq, acceptance)
        acceptance.through = seq - 1
        return acceptance

    async def join_again(self) -> None:
        """Join all generations again, because events after the last one read have expired unread.

        Raises:
            BrokerUnavailable: the log cannot be read.
        """
        for generation, acceptance in self.positions.begun():
            acceptance.join(0 if acceptance.ended else await self._highest_epoch(self.subject(generation)))

    async def _fold(self, acceptance: Acceptance, stored: Stored) -> None:
        try:
            await self._offer(acceptance, decode_header(stored.data), stored.seq)
        except MalformedEvent:
            acceptance.through = stored.seq

    async def _offer(self, acceptance: Acceptance, header: Header, seq: int) -> Verdict:
        """Apply the acceptance rule; join the generation if events before this one have expired."""
        through = acceptance.through
        verdict = acceptance.offer(header, seq)
        if verdict is Verdict.ACCEPTED or not acceptance.lacks(header):
            return verdict
        subject = self.subject(header.generation)
        if acceptance.begun and await keeps(self.broker, self.stream, subject, through):
            acceptance.expect()
            return verdict
        acceptance.join(await self._highest_epoch(subject))
        return acceptance.offer(header, seq)

    async def _highest_epoch(self, subject: str) -> int:
        """Return the highest epoch that the log keeps of a generation: its takeover may lie anywhere ahead."""
        last = await self.broker.last(self.stream, subject)
        return 0 if last is None else await highest_kept_epoch(self.read(subject, 1, last.seq))

    @staticmethod
    def _entry(verdict: Verdict, acceptance: Acceptance, header: Header, stored: Stored) -> Entry | None:
        _SEEN[verdict].inc()
        if verdict is not Verdict.ACCEPTED:
            return None
        if acceptance.joined_at == stored.seq:
            gap = acceptance.gap_before(stored.seq)
            return Entry(stored.seq, header.generation, header.type, stored.data, gap=gap)
        return Entry(stored.seq, header.generation, header.type, stored.data)

    def read(self, filter_: str, from_seq: int, up_to: int) -> AsyncIterator[list[Stored]]:
        """Yield the stored messages from ``from_seq`` to ``up_to``, in order and in batches.

        Raises:
            BrokerUnavailable: the log cannot be read.
        """
        if self._shared is None:
            return self.broker.read(self.stream, filter_, from_seq, up_to=up_to)
        return self._shared.read(self._key(filter_), from_seq, up_to)

    def _key(self, filter_: str) -> LogKey:
        return LogKey(self.stream, self._incarnation, filter_)

    def _known(self, subject: str, seq: int) -> tuple[int, Acceptance]:
        return (1, Acceptance()) if self._shared is None else self._shared.position(self._key(subject), seq)

    def _keep(self, subject: str, seq: int, acceptance: Acceptance) -> None:
        if self._shared is not None:
            self._shared.note(self._key(subject), seq, acceptance)
