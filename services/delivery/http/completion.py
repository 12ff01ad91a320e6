"""Waiting for the end of a generation: for clients that want the whole answer and no stream."""

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
    """Waits as a subscriber does: who waits counts as present, and who leaves does not any more.

    ``limit``: seconds for which it waits at most.
    """

    def __init__(self, streams: Streams, limit: float) -> None:
        self._streams = streams
        self._limit = limit

    async def wait(self, principal: Principal, session: str, generation: str, receive: Any) -> bool:
        """Wait until a generation has ended; tell whether it has.

        It has not when the time is over, the client has left (``receive`` of its request says so), this replica is
        going away, or the log cannot be read now.

        Raises:
            Problem: there is no such generation, or it may not be read.
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
    """Take what is said; the answer is read from the log when it is whole."""
