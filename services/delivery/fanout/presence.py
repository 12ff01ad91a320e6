"""Signal to producers that a generation has subscribers: subscribe to its presence subject while it has any."""

from contextlib import AbstractAsyncContextManager

import structlog

from schemas.subjects import presence_filter
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.jetstream.connection import Subscription

__all__ = ["Presence"]

log = structlog.get_logger()


class Presence:
    """Count this replica's subscribers of each session and generation.

    The first subscriber opens the subscription on the presence subject, the last one closes it. A subscriber of a whole
    session counts for all its generations. A producer whose request no replica answers has no subscriber.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._held: dict[str, tuple[int, Subscription | None]] = {}  # bounded by the subscribers

    def listening(self, tenant: str, session: str, generation: str | None) -> AbstractAsyncContextManager[None]:
        """Signal presence while the block runs. While the broker is unreachable, presence is unknown."""
        return _Listening(self, presence_filter(tenant, session, generation or "*"))

    async def _enter(self, subject: str) -> None:
        count, subscription = self._held.get(subject, (0, None))
        self._held[subject] = (count + 1, subscription)
        if count == 0:
            try:
                made = await self._broker.respond(subject, self._answer)
            except BrokerUnavailable as error:
                log.debug("presence not told", detail=str(error))
                return
            if subject in self._held:
                self._held[subject] = (self._held[subject][0], made)
            else:
                await self._broker.unlisten(made)

    async def _leave(self, subject: str) -> None:
        count, subscription = self._held[subject]
        if count > 1:
            self._held[subject] = (count - 1, subscription)
            return
        del self._held[subject]
        if subscription is not None:
            await self._broker.unlisten(subscription)

    def _answer(self, _data: bytes, reply: str) -> None:
        try:
            self._broker.answer(reply, b"here")
        except BrokerUnavailable as error:
            log.debug("presence not told", detail=str(error))


class _Listening:
    """Hold the presence of one subscriber. Takes a tenth of a generator's memory, since there are many."""

    __slots__ = ("_presence", "_subject")

    def __init__(self, presence: Presence, subject: str) -> None:
        self._presence = presence
        self._subject = subject

    async def __aenter__(self) -> None:
        try:
            await self._presence._enter(self._subject)
        except BaseException:
            await self._presence._leave(self._subject)
            raise

    async def __aexit__(self, *_: object) -> None:
        await self._presence._leave(self._subject)
