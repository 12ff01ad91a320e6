"""The API keys of a deployment: stored in a bucket on the broker, cached by every replica, revoked everywhere.

A replica caches all records and polls twice a second: one request for the bucket's last sequence, and a read of later
records. So a check costs no round trip, and a dead subscription cannot hide a revocation.
"""

import asyncio
import base64
import secrets
from collections.abc import Callable, Collection
from typing import Final

import msgspec
import structlog

from schemas.topology import CREDENTIALS_BUCKET, bucket_stream
from services.kit.auth import metrics
from services.kit.auth.api_keys import KeyRecord
from services.kit.clock import Clock
from services.kit.jetstream.broker import Broker, BrokerUnavailable

__all__ = ["KeyTable", "TooManyKeys"]

log = structlog.get_logger()
KEYS: Final = 10_000
POLL_SECONDS: Final = 0.5
UNKNOWN_SECONDS: Final = 0.2  # shortest time between two polls for unknown keys
_STREAM: Final = bucket_stream(CREDENTIALS_BUCKET)
_PREFIX: Final = f"$KV.{CREDENTIALS_BUCKET}."
_KEY: Final = "key."
_TICKET_SECRET: Final = "ticket-secret"  # noqa: S105  # the name of the entry


class TooManyKeys(Exception):
    """The maximum number of keys exists; remove one first."""


class KeyTable:
    """All current keys, and ``fixed`` ones from the settings, which cannot be revoked here.

    Methods that ask the broker raise `BrokerUnavailable` when it does not answer.
    """

    def __init__(self, broker: Broker, clock: Clock, fixed: Collection[KeyRecord] = ()) -> None:
        self._broker = broker
        self._clock = clock
        self._fixed = {record.id: record for record in fixed}
        self._entries: dict[str, bytes] = {}  # of the bucket; `create` bounds them by KEYS
        self._records: dict[str, KeyRecord] = {}
        self._ticket_secret: bytes | None = None
        self._incarnation = ""
        self._seq = 0
        self._refreshed_at: float | None = None
        self._tried_at: float | None = None
        self._refreshing = asyncio.Lock()
        self._revoked: list[Callable[[frozenset[str]], None]] = []

    def on_revoked(self, callback: Callable[[frozenset[str]], None]) -> None:
        """Call ``callback`` with the ids of removed keys, within a second of their removal."""
        self._revoked.append(callback)

    def get(self, id_: str) -> KeyRecord | None:
        """Return a cached key."""
        return self._fixed.get(id_) or self._records.get(id_)

    async def find(self, id_: str) -> KeyRecord | None:
        """Return a key, polling the broker if it is unknown; concurrent misses share one poll."""
        record = self.get(id_)
        if record is None:
            await self._refresh_again()
            record = self.get(id_)
        return record

    async def everything(self) -> list[KeyRecord]:
        """Return all keys now on the broker, by age."""
        await self.poll()
        return sorted(self._records.values(), key=lambda record: (record.created_at, record.id))

    async def create(self, record: KeyRecord) -> None:
        """Store a new key.

        Raises:
            TooManyKeys: the maximum number exists.
        """
        await self.poll()
        if len(self._records) >= KEYS:
            raise TooManyKeys(f"there are {KEYS} API keys: revoke one first")
        if not await self._store(_KEY + record.id, msgspec.json.encode(record)):
            raise ValueError(f"there is a key {record.id} already")
        await self.poll()

    async def revoke(self, id_: str) -> None:
        """Remove a key for good; a missing one is ignored."""
        await (await self._broker.bucket(CREDENTIALS_BUCKET)).delete(_KEY + id_)
        await self.poll()

    async def ticket_secret(self, *, again: bool = False) -> bytes:
        """Return the secret with which all replicas sign tickets; created on first use.

        ``again``: poll for a newer one first, unless another caller has just polled.
        """
        if again or self._ticket_secret is None:
            await self._refresh_again()
        if self._ticket_secret is None:
            if not await self._store(_TICKET_SECRET, base64.b64encode(secrets.token_bytes(32))):
                log.debug("ticket secret created by another replica")
            await self.poll()
        if self._ticket_secret is None:
            raise BrokerUnavailable("the secret of tickets cannot be read")
        return self._ticket_secret

    async def run(self) -> None:
        """Poll for changes until cancelled. While the broker is away the cache is unchanged."""
        while True:
            try:
                await self.poll()
            except BrokerUnavailable as error:
                log.warning("API keys not refreshed", detail=str(error))
            if self._refreshed_at is not None:
                metrics.KEYS_STALE.set(self._clock.monotonic() - self._refreshed_at)
            await asyncio.sleep(POLL_SECONDS)

    async def poll(self) -> None:
        """Update the cache from the broker."""
        async with self._refreshing:
            await self._refresh()

    async def _refresh_again(self) -> None:
        """Poll again, shared by concurrent callers; everything stored before the call is then known.

        Raises:
            BrokerUnavailable: the broker did not answer this poll or the shared one.
        """
        asked_at = self._clock.monotonic()
        async with self._refreshing:
            if self._tried_at is not None and self._tried_at > asked_at:
                if self._refreshed_at is None or self._refreshed_at < self._tried_at:
                    raise BrokerUnavailable("the API keys cannot be read")
                return
            if self._tried_at is not None:
                await asyncio.sleep(max(0.0, self._tried_at + UNKNOWN_SECONDS - asked_at))
            await self._refresh()

    async def _refresh(self) -> None:
        self._tried_at = self._clock.monotonic()
        state = await self._broker.state(_STREAM)
        is_same = state.created == self._incarnation and state.last_seq >= self._seq
        entries = dict(self._entries) if is_same else {}
        seq = self._seq if is_same else 0
        if state.last_seq > seq:
            async for batch in self._broker.read(_STREAM, _PREFIX + ">", seq + 1):
                entries |= {stored.subject.removeprefix(_PREFIX): stored.data for stored in batch}
                seq = batch[-1].seq
        self._incarnation, self._seq = state.created, max(seq, state.last_seq)
        self._refreshed_at = self._clock.monotonic()
        if entries != self._entries:
            self._take({name: data for name, data in entries.items() if data})  # an empty value marks a deletion

    def _take(self, entries: dict[str, bytes]) -> None:
        known = self._records
        found = {name.removeprefix(_KEY): _record(data) for name, data in entries.items() if name.startswith(_KEY)}
        self._entries = entries
        self._records = {id_: record for id_, record in found.items() if record is not None}
        self._ticket_secret = base64.b64decode(entries.get(_TICKET_SECRET, b"")) or None
        self._notify(known)

    def _notify(self, known: dict[str, KeyRecord]) -> None:
        metrics.KEYS.set(len(self._records) + len(self._fixed))
        gone = frozenset(id_ for id_ in known if id_ not in self._records)
        if gone:
            metrics.REVOKED.inc(len(gone))
            log.info("API keys revoked", keys=sorted(gone))
            for callback in self._revoked:
                callback(gone)

    async def _store(self, name: str, data: bytes) -> bool:
        """Store a value under a new name; return whether it was stored."""
        return await (await self._broker.bucket(CREDENTIALS_BUCKET)).create(name, data) is not None


def _record(data: bytes) -> KeyRecord | None:
    try:
        return msgspec.json.decode(data, type=KeyRecord)
    except msgspec.DecodeError:
        log.warning("stored API key not readable and ignored")
        return None
