"""Test usage that OpenRouter reports only in a lookup after the answer."""

import asyncio

from aiohttp import web

from bench.processes import free_port
from schemas.codec import encode_event
from schemas.events import UsageReported, type_of
from schemas.subjects import control_subject
from services.delivery.requests.transcript import Transcript
from services.kit.jetstream.broker import Broker
from services.producer.core.dialects.openrouter import late_usage
from tests.conftest import eventually
from tests.support.openai_answers import QUICK, ending
from tests.support.producer_worker import accepted_log, ask, ended_log, enqueue, producing

ANSWER = {
    "data": {
        "id": "gen-abc",
        "native_tokens_prompt": 11,
        "native_tokens_completion": 7,
        "native_tokens_cached": 3,
        "total_cost": 0.00012,
    }
}
CHUNK = b'data: {"id":"x","created":1,"choices":[{"index":0,"delta":{"content":"Hello"},"finish_reason":null}]}\n\n'


def test_a_lookup_returns_native_counts_and_the_exact_cost() -> None:
    usage = late_usage(b'{"data":{"native_tokens_prompt":11,"native_tokens_completion":7,"total_cost":0.00012}}')
    assert usage is not None
    assert (usage.input, usage.output, usage.cost, usage.currency) == (11, 7, "0.00012", "USD")
    assert late_usage(b"<html>") is None
    assert late_usage(b'{"error":{}}') is None


async def test_a_cancelled_answer_gets_its_usage_behind_the_terminal(broker: Broker) -> None:
    asked: list[str] = []
    hanging = asyncio.Event()

    async def complete(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "text/event-stream", "X-Generation-Id": "gen-abc"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await response.write(CHUNK)
        await hanging.wait()
        return response

    async def generation(request: web.Request) -> web.Response:
        asked.append(request.query["id"])
        return web.json_response(ANSWER) if len(asked) > 1 else web.Response(status=404)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_get("/v1/generation", generation)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    config = {"providers": {"router": {"dialect": "openrouter", "base_url": f"http://127.0.0.1:{port}/v1"}}}
    request = ask("g1", "router/some/model", params={})
    try:
        async with producing(broker, config=config):
            await enqueue(broker, request)
            await eventually(lambda: _said(broker, request, "delta"))
            assert await broker.request(control_subject("default", "s", "g1"), b"cancel") == b"ok"
            await ended_log(broker, request)
            await eventually(lambda: _said(broker, request, "usage"))
    finally:
        hanging.set()
        await runner.cleanup()
    events = await accepted_log(broker, request)
    assert [type_of(event) for event in events] == ["started", "delta", "cancelled", "usage"]
    late = events[-1]
    assert isinstance(late, UsageReported)
    assert (late.source, late.usage.input, late.usage.output, late.usage.cost) == ("lookup", 11, 7, "0.00012")
    assert asked == ["gen-abc", "gen-abc"]


async def test_usage_of_abandoned_calls_is_looked_up_by_their_own_ids_after_the_answer_ended(
    broker: Broker,
) -> None:
    calls: list[str] = []
    asked: list[str] = []

    async def complete(request: web.Request) -> web.StreamResponse:
        calls.append(f"gen-{len(calls) + 1}")
        headers = {"Content-Type": "text/event-stream", "X-Generation-Id": calls[-1]}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await response.write(CHUNK)
        if len(calls) == 3:
            await response.write(ending())
        return response

    async def generation(request: web.Request) -> web.Response:
        asked.append(request.query["id"])
        tokens = int(asked[-1].removeprefix("gen-"))
        data = {"native_tokens_prompt": 11, "native_tokens_completion": tokens}
        return web.json_response({"data": data})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_get("/v1/generation", generation)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    config = {"providers": {"router": {"dialect": "openrouter", "base_url": f"http://127.0.0.1:{port}/v1"}}}
    request = ask("g1", "router/some/model", params={}, on_producer_loss="restart")
    try:
        async with producing(broker, config=config, retry=QUICK):
            await enqueue(broker, request)

            async def told() -> list[UsageReported] | None:
                events = await accepted_log(broker, request)
                late = [e for e in events if isinstance(e, UsageReported) and e.source == "lookup"]
                return late if len(late) == 2 else None

            late: list[UsageReported] = await eventually(told)
    finally:
        await runner.cleanup()
    assert sorted((e.call, e.upstream_id, e.usage.output) for e in late) == [(1, "gen-1", 1), (2, "gen-2", 2)]
    assert sorted(asked) == ["gen-1", "gen-2"], "the last call has reported in its stream"
    transcript = Transcript()
    for event in await accepted_log(broker, request):
        transcript.offer(encode_event(event))
    assert transcript.usage is not None
    assert transcript.usage.output == 5
    assert [(c.number, c.usage and c.usage.output) for c in transcript.abandoned_calls] == [(1, 1), (2, 2)]


async def _said(broker: Broker, request, kind: str) -> bool:  # type: ignore[no-untyped-def]
    return any(type_of(event) == kind for event in await accepted_log(broker, request))
