"""Test usage in provider-specific fields, from the stream over the log to the ledger, and shipped prices.

Real processes of producer, delivery and billing; the provider answers as the real one of that name.
"""

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from bench.processes import free_port
from tests.conftest import NatsServer, eventually
from tests.support.service_processes import clean_environment, service

pytestmark = pytest.mark.acceptance

CHAT = (
    '{"id":"c","model":"m","choices":[{"index":0,"delta":{"content":"Water runs on."}}]}',
    '{"id":"c","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}',
)


def chat(*usages: str) -> tuple[str, ...]:
    return (*CHAT, *(f'{{"id":"c","model":"m","choices":[],"usage":{usage}}}' for usage in usages), "[DONE]")


ANSWERS = {
    "grok": chat(
        '{"prompt_tokens":12,"completion_tokens":1,"total_tokens":399,"completion_tokens_details":{"reasoning_tokens":386}}'
    ),
    "deepseek": chat(
        '{"prompt_tokens":1000,"completion_tokens":20,"total_tokens":1020,'
        '"prompt_cache_hit_tokens":896,"prompt_cache_miss_tokens":104}'
    ),
    "anthropic": (
        '{"type":"message_start","message":{"id":"m","model":"m","usage":{"input_tokens":15,"output_tokens":1,'
        '"cache_read_input_tokens":1800,"cache_creation_input_tokens":300,'
        '"cache_creation":{"ephemeral_5m_input_tokens":100,"ephemeral_1h_input_tokens":200}}}}',
        '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Water runs on."}}',
        '{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"input_tokens":0,"output_tokens":5}}',
        '{"type":"message_stop"}',
    ),
    "doubtful": chat('{"prompt_tokens":"12","completion_tokens":-35,"total_tokens":40.0}', "{}"),
}
PRICES = "provider,model,class,currency,amount,from,until\r\n" + "".join(
    f"{provider},*,{token_class},USD,{amount},2020-01-01,\r\n"
    for provider in ANSWERS
    for token_class, amount in (
        ("input", "3"),
        ("cached_input", "0.30"),
        ("cache_write", "3.75"),
        ("cache_write_1h", "6"),
        ("output", "15"),
        ("reasoning", "20"),
    )
)
CHARGES = {
    "grok": 12 * 3 + 1 * 15 + 386 * 20,
    "deepseek": 104 * 3 + 896 * Decimal("0.30") + 20 * 15,
    "anthropic": 15 * 3 + 1800 * Decimal("0.30") + 100 * Decimal("3.75") + 200 * 6 + 5 * 15,
    "doubtful": 12 * 3 + 28 * 15,
}


@asynccontextmanager
async def answering() -> AsyncIterator[str]:
    """A provider that answers by the path; yields its address."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for data in ANSWERS[request.path.split("/")[1]]:
            await response.write(f"data: {data}\n\n".encode())
        return response

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    try:
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


class Stage:
    """Delivery and billing, as their clients see them."""

    def __init__(self, delivery: str, billing: str, http: httpx.AsyncClient) -> None:
        self.delivery = delivery
        self.billing = billing
        self.http = http

    async def ask(self, model: str, **params: Any) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": "What is a tailrace?"}], "params": params}
        answer = await self.http.post(f"{self.delivery}/v1/sessions/s/generations", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["generation"])

    async def settled(self, generation: str) -> dict[str, Any]:
        async def row() -> dict[str, Any] | None:
            answer = await self.http.get(f"{self.billing}/v1/usage/generations/{generation}")
            known = answer.json() if answer.status_code == 200 else {}
            return known if known.get("status") not in (None, "running", "awaiting_provider") else None

        found: dict[str, Any] = await eventually(row, timeout=60, interval=0.2)
        return found


@asynccontextmanager
async def staged(nats: NatsServer, folder: Path, **settings: str) -> AsyncIterator[Stage]:
    env = clean_environment(
        TAILRACE_NATS_URL=nats.url, TAILRACE_BILLING_DATABASE_URL=f"sqlite:///{folder}/billing.db", **settings
    )
    with ExitStack() as stack:
        billing = stack.enter_context(service("billing", free_port(), env, folder))
        delivery = stack.enter_context(service("delivery", free_port(), env, folder))
        stack.enter_context(service("producer", free_port(), env, folder))
        async with httpx.AsyncClient(timeout=30) as http:
            yield Stage(delivery, billing, http)


async def test_usage_in_provider_specific_fields_is_charged_correctly(own_nats: NatsServer, tmp_path: Path) -> None:
    config, prices = tmp_path / "tailrace.toml", tmp_path / "prices.csv"
    prices.write_text(PRICES)
    async with answering() as provider:
        config.write_text(
            "".join(
                f'[providers.{name}]\ndialect = "{"anthropic" if name == "anthropic" else "openai"}"\n'
                f'base_url = "{provider}/{name}/v1"\n'
                for name in ANSWERS
            )
        )
        settings = {"TAILRACE_CONFIG": str(config), "TAILRACE_BILLING_PRICES": str(prices)}
        async with staged(own_nats, tmp_path, **settings) as stage:
            names = {name: await stage.ask(f"{name}/m", max_tokens=500) for name in ANSWERS}
            rows = {name: await stage.settled(generation) for name, generation in names.items()}
            page = (await stage.http.get(f"{stage.billing}/v1/reconciliations")).json()
    for name, row in rows.items():
        assert row["state"] == "completed", row
        assert Decimal(row["charge"]["amount"]) == Decimal(CHARGES[name]) / 1_000_000, row
    assert (rows["grok"]["reported"]["output"], rows["grok"]["reported"]["reasoning"]) == (387, 386)
    assert (rows["anthropic"]["reported"]["input"], rows["anthropic"]["reported"]["cache_write_1h"]) == (2115, 200)
    lines = {line["class"]: line["count"] for line in rows["anthropic"]["entries"][0]["lines"]}
    assert lines == {"input": 15, "cached_input": 1800, "cache_write": 100, "cache_write_1h": 200, "output": 5}
    reasons = {g["provider"]: g["reasons"] for g in page["generations"]}
    assert "usage_unreadable" in reasons["doubtful"]
    assert not any(reason.startswith("usage") for name in CHARGES if name != "doubtful" for reason in reasons[name])


@pytest.mark.parametrize("shipped", [True, False])
async def test_the_first_answer_has_a_price_unless_shipped_prices_are_off(
    own_nats: NatsServer, tmp_path: Path, shipped: bool
) -> None:
    settings = {} if shipped else {"TAILRACE_BILLING_SHIPPED_PRICES": "false"}
    async with staged(own_nats, tmp_path, **settings) as stage:
        row = await stage.settled(await stage.ask("scripted/story", tokens=20, tokens_per_second=0))
        entries = (await stage.http.get(f"{stage.billing}/v1/ledger")).json()["entries"]
    if not shipped:
        assert (row["charge"]["status"], entries) == ("unpriced", [])
        return
    usage = row["reported"]
    assert Decimal(row["charge"]["amount"]) == Decimal(usage["input"] * 1 + usage["output"] * 4) / 1_000_000
    assert [(e["kind"], e["amount"], e["currency"]) for e in entries] == [("charge", row["charge"]["amount"], "USD")]
