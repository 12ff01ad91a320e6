"""Look up sessions and generations: lists from the bucket, transcripts from the log."""

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from schemas.codec import MalformedEvent
from schemas.requests import Announcement, DeletedSession, GenerationRecord
from schemas.subjects import generation_key, log_filter, session_key
from schemas.topology import BUCKET, REGISTRY_BUCKET, token_stream
from services.delivery.errors import Deleted, Unknown
from services.delivery.requests.deleted_sessions import deletion_of
from services.delivery.requests.transcript import Transcript
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable

__all__ = ["ENDED", "Lookups"]

ENDED: Final = frozenset({"completed", "failed", "cancelled", "interrupted", "deleted"})
RECENT: Final = 20_000
REGISTRY_SECONDS: Final = 2.0
_STREAM: Final = f"KV_{BUCKET}"
_PREFIX: Final = f"$KV.{BUCKET}."


class Lookups:
    """Read and write generation records. Raises `BrokerUnavailable` if the bucket does not answer.

    ``partition_of``: returns the partition of a tenant's session.
    """

    def __init__(self, broker: Broker, clock: Clock, partition_of: Callable[[str, str], Awaitable[int]]) -> None:
        self._broker = broker
        self._clock = clock
        self._partition_of = partition_of
        self._announced: tuple[float, list[Announcement]] | None = None

    async def get(self, tenant: str, session: str, generation: str) -> tuple[GenerationRecord, int] | None:
        """Return a generation's record and its revision; ``None`` when there is none.

        Reads from the bucket's leader: another replica may lag and miss a record created a moment ago.
        """
        stored = await self._broker.last(_STREAM, _PREFIX + generation_key(tenant, session, generation))
        if stored is None or not stored.data:  # a deletion marker is empty
            return None
        try:
            return msgspec.json.decode(stored.data, type=GenerationRecord), stored.seq
        except msgspec.DecodeError:
            return None

    async def create(self, record: GenerationRecord) -> int | None:
        """Store a new record and return its revision; ``None`` if one exists already."""
        key = generation_key(record.tenant, record.session, record.generation)
        return await (await self._broker.bucket()).create(key, msgspec.json.encode(record))

    async def update(self, record: GenerationRecord, revision: int) -> bool:
        """Replace a record if it still has this revision; return whether it had."""
        key = generation_key(record.tenant, record.session, record.generation)
        return await (await self._broker.bucket()).update(key, msgspec.json.encode(record), revision)

    async def forget(self, record: GenerationRecord, revision: int) -> bool:
        """Remove a record whose request could not be queued, unless it has changed; return whether it is removed."""
        key = generation_key(record.tenant, record.session, record.generation)
        return await (await self._broker.bucket()).delete(key, revision)

    async def require(self, tenant: str, session: str, generation: str) -> GenerationRecord | None:
        """Check that a generation exists, in the bucket or in the log; return its record if it has one.

        Raises:
            Unknown: the generation does not exist.
            Deleted: its session was deleted.
            BrokerUnavailable: neither answers.
        """
        away: BrokerUnavailable | None = None
        try:
            if (found := await self.get(tenant, session, generation)) is not None:
                if found[0].state == "deleted":
                    raise Deleted(f"session {session!r} was deleted, and generation {generation!r} with it")
                return found[0]
        except BrokerUnavailable as error:
            away = error  # the log is authoritative; the bucket only saves reading it
        partition = await self._partition_of(tenant, session)
        subject = log_filter(partition, tenant, session, generation)
        if await self._broker.first(token_stream(partition), subject) is None:
            if away is not None:  # it may be queued, which only the bucket knows
                raise away
            raise Unknown(f"session {session!r} has no generation {generation!r}")
        return None

    async def transcript(self, tenant: str, session: str, generation: str) -> Transcript:
        """Return the transcript of a generation, from the events that the log keeps."""
        partition = await self._partition_of(tenant, session)
        subject = log_filter(partition, tenant, session, generation)
        transcript = await self._fold(token_stream(partition), subject, Transcript())
        if transcript.lost_beginning:
            transcript = await self._fold(token_stream(partition), subject, transcript.joined())
        return transcript

    async def _fold(self, stream: str, subject: str, transcript: Transcript) -> Transcript:
        async for batch in self._broker.read(stream, subject):
            for stored in batch:
                try:
                    transcript.offer(stored.data)
                except MalformedEvent:
                    continue
        return transcript

    async def of_session(self, tenant: str, session: str) -> list[GenerationRecord]:
        """Return the records of a session's generations, oldest first, without deleted ones."""
        return [record for record, _ in await self.kept(tenant, session) if record.state != "deleted"]

    async def kept(self, tenant: str, session: str) -> list[tuple[GenerationRecord, int]]:
        """Return the records of a session's generations with their revisions, including deleted ones."""
        return await self._records(f"{tenant}.{session}.*")

    async def deletion(self, tenant: str, session: str) -> DeletedSession | None:
        """Return the last deletion of a session, or ``None`` if there was none or its entry has expired."""
        return await deletion_of(self._broker, tenant, session)

    async def note_deletion(self, deleted: DeletedSession) -> None:
        """Store the deletion of a session."""
        bucket = await self._broker.bucket()
        await bucket.put(session_key(deleted.tenant, deleted.session), msgspec.json.encode(deleted))

    async def recent(self, tenant: str) -> list[GenerationRecord]:
        """Return the tenant's records among the `RECENT` newest changes, oldest change first."""
        state = await self._broker.state(_STREAM)
        records = await self._records(f"{tenant}.*.*", max(1, state.last_seq - RECENT))
        return [record for record, _ in records if record.state != "deleted"]

    async def models(self) -> list[Announcement]:
        """Return the announcements of the producer pools, at most two seconds old; empty before the first."""
        now = self._clock.monotonic()
        if self._announced is not None and now - self._announced[0] < REGISTRY_SECONDS:
            return self._announced[1]
        found: list[Announcement] = []
        prefix = f"$KV.{REGISTRY_BUCKET}.pool."
        async for batch in self._broker.read(f"KV_{REGISTRY_BUCKET}", prefix + "*"):
            found += [msgspec.json.decode(stored.data, type=Announcement) for stored in batch if stored.data]
        self._announced = (now, found)
        return found

    async def _records(self, keys: str, from_seq: int = 1) -> list[tuple[GenerationRecord, int]]:
        found: list[tuple[GenerationRecord, int]] = []
        async for batch in self._broker.read(_STREAM, _PREFIX + keys, from_seq):
            for stored in batch:
                if stored.data:  # a deletion marker is empty
                    found.append((msgspec.json.decode(stored.data, type=GenerationRecord), stored.seq))
        return found
