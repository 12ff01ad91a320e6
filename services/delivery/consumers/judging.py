"""Judge delivered events by the acceptance rule; read earlier events from the log when they were not delivered here."""

from collections import OrderedDict
from typing import Final, NamedTuple

from schemas.codec import Header, MalformedEvent, decode_header
from schemas.subjects import InvalidSubject, parse_address
from services.delivery import metrics
from services.delivery.consumers.verdicts import Track
from services.kit.jetstream.broker import Broker
from services.kit.jetstream.kept import highest_kept_epoch, keeps

__all__ = ["Judge", "Judgement"]

TRACKS: Final = 20_000
"""Most generations whose verdicts are cached, for all consumers of a process; others are read again."""


class Judgement(NamedTuple):
    """``accepted``: whether to deliver the event. ``gap``: reason why events before it are missing, or empty."""

    accepted: bool
    header: Header | None
    gap: str = ""


class Judge:
    """Apply the acceptance rule to stored messages, for all consumers of a process.

    The verdict on a message follows from the kept messages before it, so it is the same for every reader and every
    delivery. Messages that this process has not judged yet are read from the log.
    """

    def __init__(self, broker: Broker, limit: int = TRACKS) -> None:
        self._broker = broker
        self._limit = limit
        self._tracks: OrderedDict[tuple[str, str], Track] = OrderedDict()

    async def judge(
        self, stream: str, incarnation: str, subject: str, seq: int, data: bytes, *, since: int
    ) -> Judgement:
        """Judge a stored message.

        ``since``: all messages of the subject with stream sequences in (``since``, ``seq``) were judged here. The log
        is read only when the messages up to ``since`` were not.

        Raises:
            BrokerUnavailable: the earlier messages cannot be read.
        """
        header = read_header(subject, data)
        track = self._track(incarnation, subject)
        if seq > track.through:
            if track.through < since or track.through == 0:
                await self._fill(track, stream, subject, seq - 1)
            await self._join(track, stream, subject, seq, header)
            track.apply(seq, header)
        verdict = track.verdict(seq)
        if verdict is None:
            track = Track()
            await self._fill(track, stream, subject, seq - 1)
            await self._join(track, stream, subject, seq, header)
            track.apply(seq, header)
            verdict = track.verdict(seq) or "duplicate"
        metrics.CONSUMER_EVENTS.labels(verdict).inc()
        return Judgement(verdict == "accepted", header, track.acceptance.gap_before(seq))

    def _track(self, incarnation: str, subject: str) -> Track:
        key = (incarnation, subject)
        track = self._tracks.get(key)
        if track is None:
            track = self._tracks[key] = Track()
            if len(self._tracks) > self._limit:
                self._tracks.popitem(last=False)
        else:
            self._tracks.move_to_end(key)
        return track

    async def _fill(self, track: Track, stream: str, subject: str, up_to: int) -> None:
        """Read and judge the messages up to ``up_to``. Concurrent calls are safe: each message is judged once."""
        if up_to <= track.through:
            return
        await self._join_after_expiry(track, stream, subject)
        async for batch in self._broker.read(stream, subject, track.through + 1, up_to=up_to):
            metrics.CONSUMER_READ_BACK.inc(len(batch))
            for stored in batch:
                header = read_header(subject, stored.data)
                await self._join(track, stream, subject, stored.seq, header)
                track.apply(stored.seq, header)

    async def _join_after_expiry(self, track: Track, stream: str, subject: str) -> None:
        """Join again if the last judged message has expired: a takeover after it may have expired too."""
        acceptance, through = track.acceptance, track.through
        if not acceptance.begun or await keeps(self._broker, stream, subject, through):
            return
        highest = 0 if acceptance.ended else await highest_kept_epoch(self._broker.read(stream, subject))
        if track.through == through:
            acceptance.join(highest)

    async def _join(self, track: Track, stream: str, subject: str, seq: int, header: Header | None) -> None:
        """Join the generation at the highest kept epoch when the events before ``header`` have expired.

        Other tasks may judge events of the same generation meanwhile, so the state is checked again after each await.
        """
        acceptance = track.acceptance
        if header is None or seq <= track.through or not acceptance.lacks(header):
            return
        if acceptance.begun:
            through = track.through
            kept = await keeps(self._broker, stream, subject, through)
            if track.through != through or not acceptance.lacks(header):
                return
            if kept:
                acceptance.expect()
                return
        highest = await highest_kept_epoch(self._broker.read(stream, subject))
        if seq > track.through and acceptance.lacks(header):
            acceptance.join(max(highest, header.epoch))


def read_header(subject: str, data: bytes) -> Header | None:
    """Return an event's header, or None for data that is no event of the generation in the subject."""
    try:
        header = decode_header(data)
        return header if header.generation == parse_address(subject).generation else None
    except (MalformedEvent, InvalidSubject):
        return None
