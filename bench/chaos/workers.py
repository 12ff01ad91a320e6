"""Services that share the events of a durable consumer, drop connections, and omit acknowledgements."""

import asyncio
import contextlib
import random
from typing import Any, Final

import aiohttp
import msgspec

from bench.chaos.clients import AWAY, Client
from bench.chaos.history import Said, Served, Worked
from bench.chaos.schedule import Worker

__all__ = ["ConsumerWorker", "create_consumer"]

DEFINITION: Final = {"ack_wait": 3.0, "max_in_flight": 200, "max_deliver": 100}
BATCH: Final = 50
QUIET_PULLS: Final = 5
"""Empty pulls of a second in a row after which a worker ends: longer than the redelivery of an omitted event takes."""


async def create_consumer(client: Client, name: str) -> None:
    """Create a durable consumer of all sessions from the first event on; retry until confirmed."""
    for tries in range(60):
        url = f"{client.url(tries)}/v1/consumers/{name}"
        with contextlib.suppress(*AWAY):
            timeout = aiohttp.ClientTimeout(5)
            headers = client.credentials.headers()
            async with client.http.put(url, json=DEFINITION, headers=headers, timeout=timeout) as response:
                if response.status in (200, 201):
                    return
        await asyncio.sleep(0.3)


class _Given(msgspec.Struct):
    token: str
    deliveries: int
    event: msgspec.Raw


class _Batch(msgspec.Struct):
    events: list[_Given] = []


class ConsumerWorker:
    """Pull batches and acknowledge them, except for a share of the events; drop connections; run until stopped."""

    def __init__(self, number: int, worker: Worker, client: Client) -> None:
        self.number = number
        self.worker = worker
        self._client = client
        self._random = random.Random(f"{worker.consumer} {number}")
        self._quiet = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set and `QUIET_PULLS` were empty; the caller cancels it after a time limit."""
        stays: list[float | None] = [*self.worker.stays, None]
        tries = 0
        try:
            while not self._through(stop):
                stay = stays.pop(0) if len(stays) > 1 else None
                with contextlib.suppress(*AWAY):
                    async with asyncio.timeout(stay):
                        await self._work(self.worker.replicas[tries % len(self.worker.replicas)] + tries, stop)
                tries += 1
                await asyncio.sleep(0.2)
        finally:
            done = self._through(stop)
            self._client.add(Worked(worker=self.number, consumer=self.worker.consumer, done=done))

    def _through(self, stop: asyncio.Event) -> bool:
        return stop.is_set() and self._quiet >= QUIET_PULLS

    async def _work(self, replica: int, stop: asyncio.Event) -> None:
        base = f"{self._client.url(replica)}/v1/consumers/{self.worker.consumer}"
        while not self._through(stop):
            given = await self._pull(base)
            self._quiet = 0 if given else self._quiet + 1
            kept = [g for g in given if g.deliveries > 1 or self._random.random() >= self.worker.forgets]
            if kept:
                await self._acknowledge(base, kept)

    async def _pull(self, base: str) -> list[_Given]:
        url, headers = f"{base}/events?batch={BATCH}&wait=1", self._client.credentials.headers()
        timeout = aiohttp.ClientTimeout(total=6, sock_connect=3)
        async with self._client.http.get(url, headers=headers, timeout=timeout) as response:
            data = await response.read()
            if response.status != 200:
                await self._refused(response.status, data)
                return []
        given = msgspec.json.decode(data, type=_Batch).events
        for each in given:
            self._client.add(
                Served(
                    worker=self.number,
                    consumer=self.worker.consumer,
                    data=bytes(each.event).decode(),
                    deliveries=each.deliveries,
                )
            )
        return given

    async def _acknowledge(self, base: str, given: list[_Given]) -> None:
        body: dict[str, Any] = {"acks": [each.token for each in given]}
        timeout = aiohttp.ClientTimeout(total=6, sock_connect=3)
        headers = self._client.credentials.headers()
        async with self._client.http.post(f"{base}/acks", json=body, headers=headers, timeout=timeout) as response:
            data = await response.read()
            if response.status == 200:
                self._client.add(Worked(worker=self.number, consumer=self.worker.consumer, acked=len(given)))
            else:
                await self._refused(response.status, data)

    async def _refused(self, status: int, data: bytes) -> None:
        if status not in (429, 503) and not self._client.credentials.has_expired(status, data):
            self._client.add(Said(watch=-2, event=f"consumer {status}", data=data.decode()[:300]))
        raise TimeoutError
