"""Track deleted sessions: their entries in the look-up bucket, and notices between replicas."""

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import structlog

from schemas.cursor import CursorIssuer
from schemas.requests import DeletedSession
from schemas.subjects import DELETED_FILTER, session_key
from schemas.topology import BUCKET, bucket_stream
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.connection import Message

__all__ = ["DeletedSessions", "deletion_of"]

log = structlog.get_logger()
_STREAM: Final = bucket_stream(BUCKET)
_PREFIX: Final = f"$KV.{BUCKET}."


class DeletedSessions:
    """Look up deleted sessions, and notify callbacks of deletions."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._callbacks: list[Callable[[DeletedSession], Awaitable[None]]] = []
        self.heard = False
        """Whether this replica has subscribed to deletions by other replicas."""

    async def through(self, tenant: str, session: str, issuer: CursorIssuer) -> int:
        """Return the stream sequence up to which a session was deleted from this log; 0 if it was not.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        deleted = await deletion_of(self._broker, tenant, session)
        if deleted is None or deleted.partition != issuer.partition:
            return 0
        then = CursorIssuer(deleted.partition, deleted.incarnation, tenant, session)
        return deleted.through if then.incarnation == issuer.incarnation else 0

    def on_deleted(self, callback: Callable[[DeletedSession], Awaitable[None]]) -> None:
        """Call ``callback`` when a session is deleted, here or by another replica."""
        self._callbacks.append(callback)

    async def notify(self, deleted: DeletedSession) -> None:
        """Call the callbacks of `on_deleted`."""
        for callback in self._callbacks:
            await callback(deleted)

    async def listen(self) -> None:
        """Subscribe to deletions by other replicas unless `heard` is set; to be called until it is."""
        if self.heard:
            return
        try:
            await self._broker.subscribe(DELETED_FILTER, self._hear)
            self.heard = True
        except BrokerUnavailable as error:
            log.warning("deletions were not heard yet", detail=str(error))

    async def _hear(self, msg: Message) -> None:
        try:
            await self.notify(msgspec.json.decode(msg.data, type=DeletedSession))
        except msgspec.DecodeError as error:
            log.warning("deletion was not readable", detail=str(error))


async def deletion_of(broker: Broker, tenant: str, session: str) -> DeletedSession | None:
    """Return the last deletion of a session, or ``None`` if there was none or its entry has expired.

    Raises:
        BrokerUnavailable: the bucket cannot be read.
    """
    stored = await broker.last(_STREAM, _PREFIX + session_key(tenant, session))
    if stored is None or not stored.data:
        return None
    try:
        return msgspec.json.decode(stored.data, type=DeletedSession)
    except msgspec.DecodeError:
        return None
