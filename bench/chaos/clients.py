"""Those who ask and those who read, over HTTP, with as much patience as a good client has."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from typing import Final

import aiohttp
import msgspec

from bench.chaos.history import AnyRecord, CancelAsked, Connected, Got, Left, Posted, Said
from bench.chaos.provider import Order
from bench.chaos.schedule import Ask, Cancel, Watch
from schemas.codec import decode_header
from schemas.cursor import Cursor
from schemas.events import TERMINAL_TYPES

__all__ = ["MODEL", "Accepted", "Client", "Subscriber"]

MODEL: Final = "chaos/text"
PATIENCE: Final = 45.0
SILENCE: Final = 4.0
"""Seconds without even a heartbeat after which a subscriber tries elsewhere."""
_AWAY = (aiohttp.ClientError, OSError, TimeoutError)


class Accepted(msgspec.Struct):
    """The part of a 202 that is needed."""

    session: str
    generation: str
    cursor: str


class Client:
    """Asks for generations and cancels them, at either replica."""

    def __init__(self, http: aiohttp.ClientSession, replicas: list[str], add: Callable[[AnyRecord], None]) -> None:
        self.http = http
        self.replicas = replicas
        self.add = add

    def url(self, replica: int) -> str:
        """Return the address of a replica."""
        return self.replicas[replica % len(self.replicas)]

    async def ask(self, number: int, ask: Ask) -> Accepted | None:
        """Ask until it is accepted, each time at another replica, with one idempotency key; ``None`` in the end."""
        order = Order(key=ask.key, tokens=ask.tokens, rate=ask.rate, ending=ask.ending, refusals=ask.refusals)
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": msgspec.json.encode(order).decode()}],
            "on_producer_loss": "restart" if ask.restart else "interrupt",
            "on_disconnect": "continue" if ask.grace is None else {"cancel_after": ask.grace},
        }
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                for tries in itertools.count(1):
                    path = f"{self.url(ask.replica + tries)}/v1/sessions/{ask.session}/generations"
                    answer = await self._post(path, body, {"Idempotency-Key": ask.key})
                    if answer is not None:
                        self.add(
                            Posted(
                                ask=number,
                                key=ask.key,
                                session=answer.session,
                                generation=answer.generation,
                                cursor=answer.cursor,
                                seconds=ask.seconds,
                                tries=tries,
                            )
                        )
                        return answer
                    await asyncio.sleep(0.3)
        return None

    async def _post(self, url: str, body: object, headers: dict[str, str]) -> Accepted | None:
        try:
            async with self.http.post(url, json=body, headers=headers, timeout=aiohttp.ClientTimeout(8)) as response:
                data = await response.read()
                if response.status == 202:
                    return msgspec.json.decode(data, type=Accepted)
                if response.status not in (429, 503):
                    self.add(Said(watch=-1, event=f"ask {response.status}", data=data.decode()[:500]))
        except _AWAY:
            pass
        return None

    async def cancel(self, cancel: Cancel, session: str, generation: str) -> None:
        """Ask for a cancellation, a few times if it is not taken."""
        self.add(CancelAsked(generation=generation))
        for tries in range(10):
            url = f"{self.url(cancel.replica + tries)}/v1/sessions/{session}/generations/{generation}/cancel"
            with contextlib.suppress(*_AWAY):
                async with self.http.post(url, timeout=aiohttp.ClientTimeout(5)) as response:
                    if response.status < 300:
                        self.add(CancelAsked(generation=generation, status=response.status))
                        return
            await asyncio.sleep(0.3)


class Subscriber:
    """Reads one generation to its terminal, or a session until `finish` has named the last cursor and it is there.

    It drops its connections as its watch says, and comes back with its last id.
    """

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

    def finish(self, goal: int) -> None:
        """The session has nothing more after the stream sequence ``goal``."""
        self._goal = goal

    async def run(self) -> None:
        """Read to the end; to be cancelled when patience has ended."""
        stays: list[float | None] = [*self.watch.stays, None]
        tries = 0
        try:
            while not self._there():
                stay = stays.pop(0) if len(stays) > 1 else None
                replica = self.watch.replicas[min(tries, len(self.watch.replicas) - 1)] + max(
                    0, tries - len(self.watch.replicas) + 1
                )
                tries += 1
                with contextlib.suppress(*_AWAY):
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
        query = {} if self.generation is None else {"generation": self.generation}
        headers = {}
        if self.cursor is not None:
            headers["Last-Event-ID"] = self.cursor
        elif self.generation is None:
            query["from"] = "start"
        url = f"{self._client.url(replica)}/v1/sessions/{self.session}/events"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=3, sock_read=SILENCE)
        status = 0
        try:
            async with self._client.http.get(url, params=query, headers=headers, timeout=timeout) as response:
                status = response.status
                self._client.add(Connected(watch=self.number, replica=replica % 2, cursor=self.cursor, status=status))
                await self._read(response)
        finally:
            if status == 0:
                self._client.add(Connected(watch=self.number, replica=replica % 2, cursor=self.cursor, status=0))

    async def _read(self, response: aiohttp.ClientResponse) -> None:
        if response.status == 204:
            self._complete = True
            return
        if response.status != 200:
            self._say("status", f"{response.status} {(await response.text())[:300]}")
            await asyncio.sleep(0.3)
            return
        block: list[str] = []
        async for line in response.content:
            text = line.decode().rstrip("\r\n")
            if text:
                block.append(text)
                continue
            self._take(block)
            block = []
            if self._there():
                return

    def _take(self, block: list[str]) -> None:
        fields = dict(line.split(": ", 1) for line in block if ": " in line and not line.startswith(":"))
        if "event" in fields:
            self._say(fields["event"], fields.get("data", ""))
        elif "id" in fields:
            data, self.cursor = fields["data"], fields["id"]
            self._client.add(Got(watch=self.number, cursor=self.cursor, data=data))
            if self.generation is not None and decode_header(data.encode()).type in TERMINAL_TYPES:
                self._complete = True

    def _say(self, event: str, data: str) -> None:
        self._client.add(Said(watch=self.number, event=event, data=data))
