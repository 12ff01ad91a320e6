"""Clients that request and cancel generations, with the retries of a good client."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Final

import aiohttp
import msgspec

from bench.chaos.credentials import Credentials
from bench.chaos.history import AnyRecord, CancelAsked, Exported, Posted, Said
from bench.chaos.provider import Order
from bench.chaos.schedule import Ask, Cancel, Export

__all__ = ["AWAY", "MODEL", "Accepted", "Client"]

MODEL: Final = "chaos/text"
PATIENCE: Final = 45.0
AWAY = (aiohttp.ClientError, OSError, TimeoutError)


class Accepted(msgspec.Struct):
    """The fields used of a 202 response."""

    session: str
    generation: str
    cursor: str


class Client:
    """Request and cancel generations at any replica of delivery; send exports to billing.

    ``replicas``, ``calls`` and ``billings``: addresses for HTTP, for gRPC, and of billing.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        replicas: Sequence[str],
        add: Callable[[AnyRecord], None],
        credentials: Credentials,
        calls: Sequence[str] = (),
        billings: Sequence[str] = (),
    ) -> None:
        self.http = http
        self.replicas = replicas
        self.add = add
        self.credentials = credentials
        self.calls = calls
        self._billings = billings

    def url(self, replica: int) -> str:
        """Return the address of a replica."""
        return self.replicas[replica % len(self.replicas)]

    async def ask(self, number: int, ask: Ask) -> Accepted | None:
        """Request until accepted, at alternating replicas and with one idempotency key; return ``None`` on failure."""
        order = Order(
            key=ask.key, tokens=ask.tokens, rate=ask.rate, ending=ask.ending, refusals=ask.refusals, size=ask.size
        )
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
                    answer = await self._post(path, body, {"Idempotency-Key": ask.key} | self.credentials.headers())
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
                if response.status not in (429, 503) and not self.credentials.has_expired(response.status, data):
                    self.add(Said(watch=-1, event=f"ask {response.status}", data=data.decode()[:500]))
        except AWAY:
            pass
        return None

    async def cancel(self, cancel: Cancel, session: str, generation: str) -> None:
        """Request a cancellation; retry a few times if it is not accepted."""
        self.add(CancelAsked(generation=generation))
        for tries in range(10):
            url = f"{self.url(cancel.replica + tries)}/v1/sessions/{session}/generations/{generation}/cancel"
            with contextlib.suppress(*AWAY):
                async with self.http.post(
                    url, headers=self.credentials.headers(), timeout=aiohttp.ClientTimeout(5)
                ) as response:
                    if response.status < 300:
                        self.add(CancelAsked(generation=generation, status=response.status))
                        return
            await asyncio.sleep(0.3)

    async def export(self, export: Export, generation: str) -> None:
        """Send a provider's export to billing until it is accepted; billing may accept it twice."""
        row = {"generation": generation, "input": export.input, "output": export.output}
        body = msgspec.json.encode([row])
        for tries in range(40):
            url = f"{self._billings[tries % len(self._billings)]}/v1/provider-usage"
            headers = {"Content-Type": "application/json"} | self.credentials.headers()
            with contextlib.suppress(*AWAY):
                timeout = aiohttp.ClientTimeout(5)
                async with self.http.post(url, data=body, headers=headers, timeout=timeout) as response:
                    if response.status == 200:
                        self.add(Exported(generation=generation, input=export.input, output=export.output))
                        return
                    data = await response.read()
                    if response.status < 500 and not self.credentials.has_expired(response.status, data):
                        self.add(Said(watch=-1, event=f"export {response.status}", data=data.decode()[:500]))
            await asyncio.sleep(0.5)

    async def set_budget(self, tokens: int) -> None:
        """Set a budget for the tenant, so that every generation is reserved and settled; retry until confirmed."""
        body = {"period": "month", "unit": "tokens", "hard": str(tokens)}
        for tries in range(60):
            url = f"{self._billings[tries % len(self._billings)]}/v1/budgets/all"
            headers = self.credentials.headers()
            with contextlib.suppress(*AWAY):
                async with self.http.put(url, json=body, headers=headers, timeout=aiohttp.ClientTimeout(5)) as response:
                    if response.status in (200, 201):
                        return
            await asyncio.sleep(0.3)
