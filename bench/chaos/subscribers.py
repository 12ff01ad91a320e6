"""Subscribers over any protocol: they drop connections, and resume with their last cursor at another replica."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from bench.chaos.clients import Accepted, Client
from bench.chaos.history import Connected, Got, Left, Said, Stuck
from bench.chaos.protocols.calls import read_call
from bench.chaos.protocols.sockets import read_socket
from bench.chaos.protocols.streams import read_lines, read_sse
from bench.chaos.protocols.stuck import read_late
from bench.chaos.protocols.wanted import AWAY, Refused, Wanted
from bench.chaos.schedule import Protocol, Watch
from schemas.codec import decode_header
from schemas.cursor import Cursor
from schemas.events import TERMINAL_TYPES

__all__ = ["Subscriber"]

Read = Callable[[Wanted], Awaitable[None]]
_PROTOCOLS: Final[Mapping[Protocol, Read]] = {
    "sse": read_sse,
    "ndjson": read_lines,
    "websocket": read_socket,
    "grpc": read_call,
}
STUCK_TRIES: Final = 30


class Subscriber:
    """Read one generation to its terminal, or a session up to the last stream sequence set by `finish`."""

    def __init__(self, number: int, watch: Watch, accepted: Accepted, client: Client) -> None:
        self.number = number
        self.watch = watch
        self.session = accepted.session
        self.generation = accepted.generation if watch.scope == "generation" else None
        self.cursor = None if watch.scope == "start" else accepted.cursor
        self.start = 0 if self.cursor is None else Cursor.parse(self.cursor).seq
        self._client = client
        self._goal: int | None = None
        self._complete = False
        self._said_bye = False

    def finish(self, goal: int) -> None:
        """Set the session's last stream sequence, after which the subscriber ends."""
        self._goal = goal

    async def run(self) -> None:
        """Read to the end; the caller cancels it after a time limit."""
        stays: list[float | None] = [*self.watch.stays, None]
        tries = 0
        try:
            if self.watch.stuck:
                await self._take_nothing(self.watch.stuck)
            while not self._there():
                stay = stays.pop(0) if len(stays) > 1 else None
                replica = self.watch.replicas[min(tries, len(self.watch.replicas) - 1)] + max(
                    0, tries - len(self.watch.replicas) + 1
                )
                tries += 1
                with contextlib.suppress(*AWAY):
                    async with asyncio.timeout(stay):
                        await self._connection(replica)
                await asyncio.sleep(0.1)
        finally:
            self._client.add(
                Left(
                    watch=self.number,
                    session=self.session,
                    generation=self.generation,
                    start=self.start,
                    complete=self._there(),
                )
            )

    def _there(self) -> bool:
        if self._complete or self._goal is None:
            return self._complete
        return (Cursor.parse(self.cursor).seq if self.cursor else 0) >= self._goal

    async def _connection(self, replica: int) -> None:
        client, cursor = self._client, self.cursor
        told = False

        def opened(status: int) -> None:
            nonlocal told
            told = True
            client.add(Connected(watch=self.number, replica=replica % 2, cursor=cursor, status=status))

        wanted = self._wanted(replica, opened)
        try:
            await _PROTOCOLS[self.watch.protocol](wanted)
        except Refused as refused:
            opened(refused.status)
            self._say("status", f"{refused.status} {refused.detail[:300]}")
            await asyncio.sleep(0.3)
        finally:
            if not told:
                opened(0)

    async def _take_nothing(self, seconds: float) -> None:
        """Open a stream and do not read until the server has evicted it, or should have."""
        for tries in range(STUCK_TRIES):
            with contextlib.suppress(*AWAY):
                ended = await read_late(self._wanted(self.watch.replicas[0] + tries, lambda _: None), seconds)
                self._client.add(Stuck(watch=self.number, ended=ended and not self._said_bye))
                return
            await asyncio.sleep(0.3)

    def _wanted(self, replica: int, opened: Callable[[int], None]) -> Wanted:
        client = self._client
        return Wanted(
            http=client.http,
            url=client.url(replica),
            call=client.calls[replica % len(client.calls)] if client.calls else "",
            headers=client.credentials.headers(),
            session=self.session,
            generation=self.generation,
            cursor=self.cursor,
            window=self.watch.window,
            opened=opened,
            got=self._take,
            said=self._say,
            over=self._over,
            there=self._there,
        )

    def _take(self, got: Got) -> None:
        got.watch, self.cursor = self.number, got.cursor
        self._client.add(got)
        type_ = got.type or decode_header(got.data.encode()).type
        if self.generation is not None and type_ in TERMINAL_TYPES:
            self._complete = True

    def _over(self) -> None:
        """Mark the subscriber as complete."""
        self._complete = True

    def _say(self, event: str, data: str) -> None:
        self._said_bye |= event == "bye"
        self._client.add(Said(watch=self.number, event=event, data=data))
