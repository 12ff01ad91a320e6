"""Wait for the end of a generation, for clients that want the complete result and no stream."""

import asyncio
from typing import Any, Final

from services.delivery.fanout.streams import ReadOptions, Streams
from services.delivery.fanout.subscriber import Subscriber
from services.delivery.formats.raw import RawFormat
from services.delivery.http.asgi import watching
from services.kit.auth.principal import Principal

__all__ = ["Completion"]

_FORMAT: Final = RawFormat("complete")
_ENDS: Final = frozenset({"terminal", "complete"})


class Completion:
    """Wait for generations as a subscriber, so that a waiting client counts as present until it disconnects.

    ``limit``: longest wait in seconds.
    """

    def __init__(self, streams: Streams, limit: float) -> None:
        self._streams = streams
        self._limit = limit

    async def wait(self, principal: Principal, session: str, generation: str, receive: Any) -> bool:
        """Wait for the end of a generation; return whether it has ended.

        Return False after ``limit`` seconds, when the client has disconnected (read from ``receive``), when this
        replica drains, or when the log cannot be read.

        Raises:
            Problem: the generation does not exist, or the principal may not read it.
        """
        stream = await self._streams.open(principal, ReadOptions.read(session, generation=generation, from_="live"))
        if stream.seq is None:
            return True
        timers: list[asyncio.TimerHandle] = []
        with watching(receive) as watch:

            def joined(subscriber: Subscriber) -> None:
                watch(subscriber)
                loop = asyncio.get_running_loop()
                timers.append(loop.call_later(self._limit, subscriber.stop, "batch"))

            try:
                return await self._streams.serve(stream, _nothing, _FORMAT, joined) in _ENDS
            finally:
                for timer in timers:
                    timer.cancel()


async def _nothing(_message: object) -> None:
    """Discard a message; the result is read from the log after the end."""
