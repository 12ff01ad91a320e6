"""Write the state of generations to the look-up bucket, without delaying the log."""

import asyncio
from typing import Final

import msgspec
import structlog

from schemas.requests import Announcement, GenerationRecord
from schemas.subjects import generation_key
from schemas.topology import REGISTRY_BUCKET
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.errors import MessageTooLarge

__all__ = ["Records"]

log = structlog.get_logger()
_LONGEST_PAUSE: Final = 3.0
_WAITING: Final = 10_000


class Records:
    """Keep the look-up records of generations.

    `put` notes the newest record of a generation; `write` stores the noted records. Without the bucket look-ups are
    stale, but streams are not: the log is authoritative.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._noted: dict[str, GenerationRecord] = {}  # bounded by _WAITING
        self._wake = asyncio.Event()

    async def get(self, tenant: str, session: str, generation: str) -> GenerationRecord | None:
        """Return the record, or ``None`` when there is none or the bucket does not answer."""
        try:
            bucket = await self._broker.bucket()
            entry = await bucket.get(generation_key(tenant, session, generation))
            return None if entry is None else msgspec.json.decode(entry.value, type=GenerationRecord)
        except (BrokerUnavailable, msgspec.DecodeError) as error:
            log.warning("look-up record not read", generation=generation, error=repr(error))
            return None

    def put(self, record: GenerationRecord) -> None:
        """Note a record to be stored soon."""
        key = generation_key(record.tenant, record.session, record.generation)
        if len(self._noted) < _WAITING or key in self._noted:
            self._noted[key] = record
            self._wake.set()
        else:
            log.warning("look-up record dropped: too many are pending", key=key)

    async def announce(self, pool: str, announcement: Announcement) -> None:
        """Announce the models of this pool to delivery.

        Raises:
            BrokerUnavailable: the bucket does not store it.
        """
        bucket = await self._broker.bucket(REGISTRY_BUCKET)
        await bucket.put(f"pool.{pool}", msgspec.json.encode(announcement))

    async def write(self) -> None:
        """Store noted records, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self.flush()

    async def flush(self) -> None:
        """Store all noted records; retry while the bucket takes none."""
        failures = 0
        while self._noted:
            key, record = next(iter(self._noted.items()))
            if not await self._store(key, msgspec.json.encode(record)):
                failures += 1
                self._noted[key] = self._noted.pop(key)  # behind the others
                await asyncio.sleep(min(_LONGEST_PAUSE, 0.1 * 2.0 ** min(failures, 6)))
                continue
            failures = 0
            if self._noted.get(key) is record:  # otherwise a newer one has been noted meanwhile
                del self._noted[key]

    async def _store(self, key: str, value: bytes) -> bool:
        try:
            bucket = await self._broker.bucket()
            await bucket.put(key, value)
        except MessageTooLarge:
            log.warning("look-up record dropped: it is too large", key=key)
        except BrokerUnavailable as error:
            log.debug("look-up record not stored yet", key=key, error=str(error))
            return False
        return True
