"""Test counts, reported usage and charges for every dialect and every ending of an answer, over real HTTP.

Real processes of producer, delivery and billing; the provider replays recorded answers. With TAILRACE_SETTLEMENT_TABLE
set, the table is written to the file that it names.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from bench.processes import free_port
from tests.conftest import NatsServer, eventually
from tests.support.provider_server import reset
from tests.support.provider_transcripts import GENERATION_ID, Transcript
from tests.support.service_processes import REPOSITORY, clean_environment, service, wait_until_answers

pytestmark = pytest.mark.acceptance
PROVIDERS = {
    "openai": Transcript("openai", "usage-details"),
    "openrouter": Transcript("openrouter", "text"),
    "anthropic": Transcript("anthropic", "cached-usage"),
    "cohere": Transcript("cohere", "text"),
    "without-usage": Transcript("openai", "no-usage"),
}
CASES = ("completed", "cancelled", "cut off", "producer killed", "client gone")
PRICES = "provider,model,class,currency,amount,from,until\r\n" + "".join(
    f"{provider},*,{token_class},USD,{amount},2020-01-01,\r\n"
    for provider in PROVIDERS
    for token_class, amount in (
        ("input", "3"),
        ("cached_input", "0.30"),
        ("cache_write", "3.75"),
        ("output", "15"),
        ("reasoning", "20"),
    )
)
RATES = {"input": 3, "cached_input": Decimal("0.30"), "cache_write": Decimal("3.75"), "output": 15, "reasoning": 20}
HEAD = ("dialect", "case", "state", "status", "counted", "reported", "entries")


@asynccontextmanager
async def replaying() -> AsyncIterator[str]:
    """Run a provider that replays the case named in the question, in the dialect of its path; yield its URL."""

    async def answer(request: web.Request) -> web.StreamResponse:
        case = (re.search(r"case=([a-z ]+)\.", await request.text()) or ["", ""])[1]
        transcript = PROVIDERS[request.path.split("/")[1]]
        frames = re.split(rb"(?<=\n\n)", transcript.wire)
        headers = {"content-type": "text/event-stream", "x-generation-id": GENERATION_ID}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        shown = frames if case == "completed" else frames[: max(4, len(frames) * 2 // 3)]
        for frame in shown:
            await response.write(frame)
            await asyncio.sleep(0.01)
        if case == "cut off":
            reset(request)
        elif case != "completed":
            await asyncio.sleep(60)
        return response

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def configured(folder: Path, url: str) -> dict[str, str]:
    """Write configuration and prices; return the variables that name them."""
    config, prices = folder / "tailrace.toml", folder / "prices.csv"
    dialects = {name: t.dialect for name, t in PROVIDERS.items()}
    base = {"openai": "/v1", "openrouter": "/api/v1", "anthropic": "/v1", "cohere": ""}
    config.write_text(
        "".join(
            f'[providers.{name}]\ndialect = "{dialect}"\nbase_url = "{url}/{name}{base[dialect]}"\n'
            for name, dialect in dialects.items()
        )
    )
    prices.write_text(PRICES)
    return {"TAILRACE_CONFIG": str(config), "TAILRACE_BILLING_PRICES": str(prices)}


@contextmanager
def producer(env: dict[str, str], folder: Path, number: int) -> Iterator[subprocess.Popen[bytes]]:
    """A producer that may be killed."""
    port, log = free_port(), folder / f"producer-{number}.log"
    with log.open("wb") as output:
        argv = [sys.executable, "-m", "services.producer"]
        own = env | {"TAILRACE_PRODUCER_PORT": str(port)}
        process = subprocess.Popen(argv, env=own, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_answers(f"http://127.0.0.1:{port}/readyz", process, log)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


class Bench:
    """Delivery and billing, as their clients see them."""

    def __init__(self, delivery: str, billing: str, http: httpx.AsyncClient) -> None:
        self.delivery = delivery
        self.billing = billing
        self.http = http
        self.names: dict[tuple[str, str], str] = {}

    def session(self, dialect: str, case: str) -> str:
        return f"{dialect}-{case.replace(' ', '-')}"

    async def ask(self, dialect: str, case: str) -> None:
        body: dict[str, Any] = {
            "model": f"{dialect}/{'claude-sonnet-4-5' if dialect == 'anthropic' else 'gpt-4o-mini'}",
            "messages": [{"role": "user", "content": f"case={case}. What is a tailrace?"}],
            "params": {"max_tokens": 500},
        }
        if case == "client gone":
            body["on_disconnect"] = {"cancel_after": 0.5}
        url = f"{self.delivery}/v1/sessions/{self.session(dialect, case)}/generations"
        answer = await self.http.post(url, json=body)
        assert answer.status_code == 202, answer.text
        self.names[dialect, case] = answer.json()["generation"]

    def url(self, dialect: str, case: str) -> str:
        return f"{self.delivery}/v1/sessions/{self.session(dialect, case)}/generations/{self.names[dialect, case]}"

    async def read_some(self, dialect: str, case: str) -> None:
        """Read the first deltas and leave."""
        query = {"generation": self.names[dialect, case]}
        url = f"{self.delivery}/v1/sessions/{self.session(dialect, case)}/events"
        async with self.http.stream("GET", url, params=query) as answer:
            deltas = 0
            async for line in answer.aiter_lines():
                deltas += '"type":"delta"' in line
                if deltas >= 2:
                    return

    async def has_ended(self, dialect: str, case: str) -> bool:
        state = (await self.http.get(self.url(dialect, case))).json()["state"]
        return state in ("completed", "failed", "cancelled", "interrupted")

    async def settled(self, dialect: str, case: str) -> dict[str, Any]:
        async def row() -> dict[str, Any] | None:
            answer = await self.http.get(f"{self.billing}/v1/usage/generations/{self.names[dialect, case]}")
            known = answer.json() if answer.status_code == 200 else {}
            return known if known.get("status") not in (None, "running", "awaiting_provider") else None

        found: dict[str, Any] = await eventually(row, timeout=30, interval=0.2)
        return found


def in_words(row: dict[str, Any]) -> tuple[str, ...]:
    reported = row["reported"]
    told = "-"
    if reported:
        more = [f"{n} {reported[n]}" for n in ("cached_input", "cache_write", "reasoning") if reported[n]]
        told = f"{reported['input']} / {reported['output']}" + (f" ({', '.join(more)})" if more else "")
    counted = f"{row['counted']['input']} / {row['counted']['output']}"
    entries = ", ".join(f"{e['kind']} {e['amount']} {e['currency']} ({e['rule']})" for e in row["entries"])
    return row["state"], row["status"], counted, told, entries or "none"


def price(row: dict[str, Any]) -> Decimal:
    """Return the expected price of a generation: from reported usage where it completed with it, else from counts."""
    reported = row["reported"]
    if row["status"] in ("matched", "drift"):
        cached, written, reasoning = (reported[n] for n in ("cached_input", "cache_write", "reasoning"))
        inputs = reported["input"] if reported["billed_input"] is None else reported["billed_input"]
        outputs = reported["output"] if reported["billed_output"] is None else reported["billed_output"]
        counts = {
            "input": inputs - cached - written,
            "cached_input": cached,
            "cache_write": written,
            "output": outputs - reasoning,
            "reasoning": reasoning,
        }
    else:
        counts = {"input": row["counted"]["input"], "output": row["counted"]["output"]}
    return sum((Decimal(count) * RATES[name] for name, count in counts.items()), Decimal(0)) / 1_000_000


async def test_every_dialect_settles_however_its_answer_ends(own_nats: NatsServer, tmp_path: Path) -> None:
    async with replaying() as provider, httpx.AsyncClient(timeout=30) as http:
        env = clean_environment(
            TAILRACE_NATS_URL=own_nats.url,
            TAILRACE_LEASE="3",
            TAILRACE_BILLING_DATABASE_URL=f"sqlite:///{tmp_path}/billing.db",
            TAILRACE_BILLING_GRACE="2",
            **configured(tmp_path, provider),
        )
        with ExitStack() as stack:
            billing = stack.enter_context(service("billing", free_port(), env, tmp_path))
            delivery = stack.enter_context(service("delivery", free_port(), env, tmp_path))
            bench = Bench(delivery, billing, http)
            with producer(env, tmp_path, 0) as first:
                for dialect in PROVIDERS:
                    for case in CASES:
                        await bench.ask(dialect, case)
                await asyncio.gather(*(bench.read_some(d, c) for d in PROVIDERS for c in CASES[1:]))
                for dialect in PROVIDERS:
                    answer = await http.post(bench.url(dialect, "cancelled") + "/cancel")
                    assert answer.status_code in (200, 202)
                rest = [(d, c) for d in PROVIDERS for c in CASES if c != "producer killed"]
                for pair in rest:
                    await eventually(lambda pair=pair: bench.has_ended(*pair), timeout=30, interval=0.1)
                first.kill()
            with producer(env, tmp_path, 1):
                for dialect in PROVIDERS:
                    await eventually(lambda d=dialect: bench.has_ended(d, "producer killed"), timeout=40, interval=0.2)
            rows = {pair: await bench.settled(*pair) for pair in bench.names}

    table = [(d, c, *in_words(row)) for (d, c), row in rows.items()]
    _write(table)
    expected = {
        "completed": "completed",
        "cancelled": "cancelled",
        "cut off": "failed",
        "producer killed": "interrupted",
        "client gone": "cancelled",
    }
    for (dialect, case), row in rows.items():
        where = f"{dialect}, {case}: {in_words(row)}"
        assert row["state"] == expected[case], where
        if case != "completed":
            assert row["status"] == "partial", where
        elif dialect == "without-usage":
            assert row["status"] == "provider_missing", where
        else:
            assert row["status"] in ("matched", "drift"), where
        assert row["counted"]["output"] > 0, where
        assert [e["kind"] for e in row["entries"]] == ["charge"], where
        assert Decimal(row["entries"][0]["amount"]) == price(row), where


def _write(table: list[tuple[str, ...]]) -> None:
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(row) + " |" for row in table]
    if "TAILRACE_SETTLEMENT_TABLE" in os.environ:
        Path(os.environ["TAILRACE_SETTLEMENT_TABLE"]).write_text("\n".join(lines) + "\n")
