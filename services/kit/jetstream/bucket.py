"""Key-value buckets: nats-py's, with its exceptions mapped."""

from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

from nats.js import errors as js_errors
from nats.js.kv import KeyValue

from services.kit.jetstream.client import heeding
from services.kit.jetstream.errors import (
    AWAY,
    WRONG_LAST_SEQUENCE,
    WRONG_LAST_SEQUENCE_CONSTANT,
    BrokerUnavailable,
    unavailable,
)

__all__ = ["Bucket", "Entry"]


class Entry(NamedTuple):
    """The value of a key, and its revision."""

    key: str
    value: bytes
    revision: int


class Bucket:
    """A bucket, created by `Broker.bucket`. Every method raises `BrokerUnavailable` when the broker does not answer."""

    def __init__(self, name: str, bucket: KeyValue) -> None:
        self.name = name
        self._bucket = bucket

    async def get(self, key: str) -> Entry | None:
        """Return a key's entry, or None. A lagging replica may answer: `Broker.last` asks the leader."""
        with unavailable(f"cannot read {key} in bucket {self.name}"):
            try:
                found = await self._bucket.get(key)
            except js_errors.KeyNotFoundError:
                return None
        return Entry(key, found.value or b"", found.revision or 0)

    async def put(self, key: str, value: bytes) -> int:
        """Store a value and return its revision.

        Raises:
            MessageTooLarge: it is larger than the broker accepts.
        """
        with unavailable(f"cannot store {key} in bucket {self.name}"):
            return await self._bucket.put(key, value)

    async def create(self, key: str, value: bytes) -> int | None:
        """Store the value of a new key and return its revision; ``None`` if the key has a value."""
        with unavailable(f"cannot create {key} in bucket {self.name}"):
            try:
                return await self._bucket.create(key, value)
            except js_errors.KeyWrongLastSequenceError:
                return None

    async def update(self, key: str, value: bytes, revision: int) -> bool:
        """Replace the value of this revision; return False if the key has another one."""
        with unavailable(f"cannot update {key} in bucket {self.name}"):
            try:
                await self._bucket.update(key, value, last=revision)
            except js_errors.KeyWrongLastSequenceError:
                return False
        return True

    async def delete(self, key: str, revision: int | None = None) -> bool:
        """Delete a key, with ``revision`` only the value of that revision; return whether it was deleted."""
        with unavailable(f"cannot delete {key} in bucket {self.name}"):
            try:
                return await self._bucket.delete(key, last=revision)
            except js_errors.APIError as error:
                if error.err_code in (WRONG_LAST_SEQUENCE, WRONG_LAST_SEQUENCE_CONSTANT):
                    return False
                raise

    async def watch(self, keys: str, silence: float) -> AsyncGenerator[Entry, None]:
        """Yield the entries of keys that match ``keys``, current values first, then changes. Close it with `aclosing`.

        Raises:
            BrokerUnavailable: nothing has come for ``silence`` seconds: a watch may have died without notice.
        """
        what = f"cannot watch {keys} in bucket {self.name}"
        with unavailable(what):
            watcher: Any = await self._bucket.watch(keys, include_history=False)
        try:
            while True:
                with unavailable(what):
                    entry = await heeding(watcher.updates(timeout=silence))
                if entry is not None and entry.value:  # None marks the end of the current values
                    yield Entry(entry.key, entry.value, entry.revision)
        finally:
            await _stop(watcher)


async def _stop(watcher: Any) -> None:
    try:
        await watcher.stop()
    except AWAY as error:
        raise BrokerUnavailable(f"cannot end a watch: {error!r}") from error
