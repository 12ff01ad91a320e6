"""Test that repeated calls are all charged: real processes, from the provider's bytes to the bill."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from bench.processes import free_port
from tests.acceptance.test_settlement import producer
from tests.conftest import NatsServer, eventually
from tests.support.openai_answers import chunk, ending
from tests.support.service_processes import clean_environment, service

pytestmark = pytest.mark.acceptance
TOKENS = 20
PRICES = "provider,model,class,currency,amount,from,until\r\n" + "".join(
    f"p,*,{name},USD,{amount},2020-01-01,\r\n" for name, amount in (("input", "3"), ("output", "15"))
)


@asynccontextmanager
async def providing() -> AsyncIterator[tuple[str, list[str]]]:
    """Run a provider whose every answer begins with 20 tokens; yield its URL and the requested models.

    ``breaks`` then breaks the connection, ``hangs`` goes silent in its first call, other models complete.
    """
    asked: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        model = (await request.json())["model"]
        asked.append(model)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(TOKENS):
            await response.write(chunk(" river"))
        if model == "hangs" and asked.count(model) == 1:
            await asyncio.Event().wait()
        elif model != "breaks":
            await response.write(ending(usage=False))
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield f"http://127.0.0.1:{port}/v1", asked
    finally:
        await runner.cleanup()


async def asking(http: httpx.AsyncClient, delivery: str, model: str) -> str:
    body = {
        "model": f"p/{model}",
        "messages": [{"role": "user", "content": "What is a tailrace?"}],
        "on_producer_loss": "restart",
    }
    answer = await http.post(f"{delivery}/v1/sessions/{model}/generations", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["generation"])


async def settled(http: httpx.AsyncClient, billing: str, generation: str) -> dict[str, Any]:
    async def row() -> dict[str, Any] | None:
        answer = await http.get(f"{billing}/v1/usage/generations/{generation}")
        known = answer.json() if answer.status_code == 200 else {}
        return known if known.get("status") not in (None, "running", "awaiting_provider") else None

    found: dict[str, Any] = await eventually(row, timeout=60, interval=0.2)
    return found


def priced(calls: int, asked: int) -> Decimal:
    return Decimal(calls * (asked * 3 + TOKENS * 15)) / 1_000_000


async def test_every_call_is_counted_listed_and_charged(own_nats: NatsServer, tmp_path: Path) -> None:
    async with providing() as (url, asked), httpx.AsyncClient(timeout=30) as http:
        config, prices = tmp_path / "tailrace.toml", tmp_path / "prices.csv"
        config.write_text(f'[providers.p]\ndialect = "openai"\nbase_url = "{url}"\n')
        prices.write_text(PRICES)
        env = clean_environment(
            TAILRACE_NATS_URL=own_nats.url,
            TAILRACE_LEASE="3",
            TAILRACE_CONFIG=str(config),
            TAILRACE_PRODUCER_RETRY_BASE="0.01",
            TAILRACE_BILLING_PRICES=str(prices),
            TAILRACE_BILLING_DATABASE_URL=f"sqlite:///{tmp_path}/billing.db",
            TAILRACE_BILLING_GRACE="1",
        )
        with ExitStack() as stack:
            billing = stack.enter_context(service("billing", free_port(), env, tmp_path))
            delivery = stack.enter_context(service("delivery", free_port(), env, tmp_path))
            with producer(env, tmp_path, 0) as first:
                broken = await settled(http, billing, await asking(http, delivery, "breaks"))
                lost = await asking(http, delivery, "hangs")

                async def said() -> bool:
                    answer = await http.get(f"{delivery}/v1/sessions/hangs/generations/{lost}")
                    return bool(answer.json()["counted"].get("output") == TOKENS)

                await eventually(said, timeout=30, interval=0.1)
                first.send_signal(signal.SIGKILL)
            with producer(env, tmp_path, 1):
                taken = await settled(http, billing, lost)
            names = {"breaks": broken["generation"], "hangs": lost}
            views = {
                s: (await http.get(f"{delivery}/v1/sessions/{s}/generations/{g}")).json() for s, g in names.items()
            }
            spent = (await http.get(f"{billing}/v1/usage")).json()["rows"][0]["totals"]

    assert asked == ["breaks"] * 3 + ["hangs"] * 2
    inputs = broken["counted"]["input"]
    assert (broken["state"], broken["code"], broken["status"]) == ("failed", "upstream_cut_off", "partial")
    assert [c["counted"]["output"] for c in broken["abandoned_calls"]] == [TOKENS, TOKENS]
    assert broken["charge"]["tokens"] == 3 * (inputs + TOKENS)
    [entry] = broken["entries"]
    assert sum(line["count"] for line in entry["lines"] if line["class"] == "output") == 60
    assert Decimal(entry["amount"]) == priced(3, inputs)

    assert taken["state"] == "completed"
    [call] = taken["abandoned_calls"]
    assert (call["number"], call["code"], call["counted"]["output"]) == (1, "producer_lost", TOKENS)
    assert (call["estimated"], call["counted"]["exact"], call["provider"]) == (True, False, "p")
    assert Decimal(taken["charge"]["amount"]) == priced(2, inputs)

    assert [c["code"] for c in views["breaks"]["abandoned_calls"]] == ["upstream_cut_off"] * 2
    assert [c["counted"]["output"] for c in views["hangs"]["abandoned_calls"]] == [TOKENS]
    assert (spent["counted_output"], spent["tokens"]) == (5 * TOKENS, 5 * (inputs + TOKENS))
