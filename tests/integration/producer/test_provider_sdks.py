"""Test that the providers' SDKs read the recorded transcripts with the same result."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import cohere
import openai
import pytest

from tests.support.provider_server import Replay, providing
from tests.support.provider_transcripts import TRANSCRIPTS, Transcript

WHOLE = [t for t in TRANSCRIPTS if t.expected[-1] == {"part": "End"} and not t.is_foreign]
ASK: Any = [{"role": "user", "content": "hi"}]


def those(*dialects: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("transcript", [t for t in WHOLE if t.dialect in dialects], ids=str)


def joined(transcript: Transcript, part: str, choice: int = 0) -> str:
    return "".join(p["text"] for p in transcript.expected if p["part"] == part and p.get("choice", 0) == choice)


def tool_calls(transcript: Transcript) -> list[tuple[str, str, Any]]:
    calls: dict[tuple[int, int], dict[str, str]] = {}
    for part in transcript.expected:
        if part["part"] == "ToolCallPart":
            call = calls.setdefault((part.get("choice", 0), part["tool_call"].get("index", 0)), {})
            for name in ("id", "name", "arguments"):
                call[name] = call.get(name, "") + part["tool_call"].get(name, "")
    return [(c["id"], c["name"], arguments(c["arguments"])) for c in calls.values()]


def arguments(text: str) -> Any:
    """Return the decoded arguments; SDKs give "" for a tool without parameters."""
    return json.loads(text or "{}")


def usage(transcript: Transcript) -> dict[str, Any]:
    return next((p["usage"] for p in transcript.expected if p["part"] == "UsagePart"), {})


def _said(content: Any) -> str:
    """Return the text of a delta's content; some providers send a list of parts, which the SDK passes on as it is."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1")


@asynccontextmanager
async def replayed(transcript: Transcript) -> AsyncIterator[str]:
    async with providing(Replay.of(transcript.wire, 100, headers=transcript.headers)) as provider:
        yield provider.url


@those("openai", "openrouter")
async def test_the_openai_sdk_reads_the_same(transcript: Transcript) -> None:
    texts: dict[int, str] = {}
    calls: dict[tuple[int, int], list[str]] = {}
    reported = None
    async with replayed(transcript) as url, openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as client:
        async for chunk in await client.chat.completions.create(model="m", messages=ASK, stream=True):
            reported = chunk.usage or reported
            for choice in chunk.choices:
                transcribed = getattr(getattr(choice.delta, "audio", None), "transcript", None)
                said = _said(choice.delta.content or choice.delta.refusal or transcribed or "")
                texts[choice.index] = texts.get(choice.index, "") + said
                for call in choice.delta.tool_calls or ():
                    whole = calls.setdefault((choice.index, call.index), ["", "", ""])
                    assert call.function is not None
                    fragments = (call.id, call.function.name, call.function.arguments)
                    for at, fragment in enumerate(fragments):
                        whole[at] += fragment or ""
    said_by_us = {c: joined(transcript, "Text", c) + joined(transcript, "Refusal", c) for c in texts}
    assert texts == said_by_us
    assert [(c[0], c[1], arguments(c[2])) for c in calls.values()] == tool_calls(transcript)
    ours = usage(transcript)
    if reported is None:
        assert ours == {}
    else:
        assert (reported.prompt_tokens, reported.completion_tokens) == (ours["input"], ours["output"])
        inputs, outputs = reported.prompt_tokens_details, reported.completion_tokens_details
        assert (inputs.cached_tokens if inputs else 0) == ours.get("cached_input", 0)
        assert (outputs.reasoning_tokens if outputs else 0) == ours.get("reasoning", 0)


@those("anthropic")
async def test_the_anthropic_sdk_reads_the_same(transcript: Transcript) -> None:
    async with (
        replayed(transcript) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as client,
        client.messages.stream(model="m", messages=ASK, max_tokens=9) as stream,
    ):
        message = await stream.get_final_message()
    assert "".join(b.text for b in message.content if b.type == "text") == joined(transcript, "Text")
    assert "".join(b.thinking for b in message.content if b.type == "thinking") == joined(transcript, "Reasoning")
    assert [(b.id, b.name, b.input) for b in message.content if b.type == "tool_use"] == tool_calls(transcript)
    theirs, ours = message.usage, usage(transcript)
    cached, written = theirs.cache_read_input_tokens or 0, theirs.cache_creation_input_tokens or 0
    assert (theirs.input_tokens + cached + written, theirs.output_tokens) == (ours["input"], ours["output"])
    assert (cached, written) == (ours.get("cached_input", 0), ours.get("cache_write", 0))


@those("cohere")
async def test_the_cohere_sdk_reads_the_same(transcript: Transcript) -> None:
    text, reasoning, calls = "", "", {}
    ending: Any = None
    async with replayed(transcript) as url, cohere.AsyncClientV2(api_key="k", base_url=url) as client:
        async for event in client.chat_stream(model="m", messages=ASK):
            match event.type:
                case "content-delta":
                    text += event.delta.message.content.text or ""
                    reasoning += event.delta.message.content.thinking or ""
                case "tool-plan-delta":
                    reasoning += event.delta.message.tool_plan
                case "tool-call-start":
                    started = event.delta.message.tool_calls
                    calls[event.index] = [started.id, started.function.name, started.function.arguments]
                case "tool-call-delta":
                    calls[event.index][2] += event.delta.message.tool_calls.function.arguments
                case "message-end":
                    ending = event.delta
    assert text == joined(transcript, "Text")
    assert reasoning == joined(transcript, "Reasoning")
    assert [(c[0], c[1], arguments(c[2])) for c in calls.values()] == tool_calls(transcript)
    ours = usage(transcript)
    assert (ending.usage.tokens.input_tokens, ending.usage.tokens.output_tokens) == (ours["input"], ours["output"])
    billed = ending.usage.billed_units
    assert (billed.input_tokens, billed.output_tokens) == (ours["billed_input"], ours["billed_output"])
