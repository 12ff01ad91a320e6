"""Test the reading of usage objects of many providers: token classes and reasons for doubt."""

from decimal import Decimal
from typing import Any

import msgspec
import pytest

from schemas.usage import Usage
from services.producer.core.dialects.openrouter import late_usage
from services.producer.core.dialects.usage import STANDARD, UsageRules, read_usage, rules_of, together

XAI = rules_of("https://api.x.ai/v1")
PERPLEXITY = rules_of("https://api.perplexity.ai")
GEMINI = rules_of("https://generativelanguage.googleapis.com/v1beta/openai")
OPENROUTER = UsageRules(currency="USD")


def chat(prompt: Any, completion: Any, total: Any = None, **more: Any) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {**counts, **({} if total is None else {"total_tokens": total}), **more}


def details(**parts: int) -> dict[str, Any]:
    return {"completion_tokens_details": parts}


CASES: dict[str, tuple[dict[str, Any], UsageRules, Usage]] = {
    "OpenAI": (chat(10, 5, 15), STANDARD, Usage(input=10, output=5)),
    "OpenAI, cached and reasoning": (
        chat(2048, 130, 2178, prompt_tokens_details={"cached_tokens": 1920}, **details(reasoning_tokens=128)),
        STANDARD,
        Usage(input=2048, output=130, cached_input=1920, reasoning=128),
    ),
    "OpenAI, cache writes": (
        chat(2048, 130, 2178, prompt_tokens_details={"cached_tokens": 1000, "cache_write_tokens": 500}),
        STANDARD,
        Usage(input=2048, output=130, cached_input=1000, cache_write=500),
    ),
    "OpenAI, audio": (
        chat(100, 50, 150, prompt_tokens_details={"audio_tokens": 60}, **details(audio_tokens=40)),
        STANDARD,
        Usage(input=100, output=50, reasons=("audio_tokens",)),
    ),
    "OpenAI Responses": (
        {
            "input_tokens": 75,
            "input_tokens_details": {"cached_tokens": 20},
            "output_tokens": 1186,
            "output_tokens_details": {"reasoning_tokens": 1024},
            "total_tokens": 1261,
        },
        STANDARD,
        Usage(input=75, output=1186, cached_input=20, reasoning=1024),
    ),
    "Grok, reasoning beside the completion": (
        chat(12, 1, 399, **details(reasoning_tokens=386)),
        STANDARD,
        Usage(input=12, output=387, reasoning=386),
    ),
    "Grok, reasoning smaller than the completion": (
        chat(12, 400, 712, **details(reasoning_tokens=300)),
        STANDARD,
        Usage(input=12, output=700, reasoning=300),
    ),
    "Grok without a total": (
        chat(12, 400, **details(reasoning_tokens=300)),
        XAI,
        Usage(input=12, output=700, reasoning=300),
    ),
    "Grok counts like everybody": (
        chat(12, 400, 412, **details(reasoning_tokens=300)),
        XAI,
        Usage(input=12, output=400, reasoning=300),
    ),
    "reasoning larger than the completion, no total": (
        chat(12, 1, **details(reasoning_tokens=386)),
        STANDARD,
        Usage(input=12, output=387, reasoning=386),
    ),
    "DeepSeek": (
        chat(1000, 20, 1020, prompt_cache_hit_tokens=896, prompt_cache_miss_tokens=104),
        STANDARD,
        Usage(input=1000, output=20, cached_input=896),
    ),
    "DeepSeek, hit and miss alone": (
        {"prompt_cache_hit_tokens": 896, "prompt_cache_miss_tokens": 104, "completion_tokens": 20},
        STANDARD,
        Usage(input=1000, output=20, cached_input=896),
    ),
    "DeepSeek, hit and miss beyond the prompt": (
        chat(500, 20, prompt_cache_hit_tokens=896, prompt_cache_miss_tokens=104),
        STANDARD,
        Usage(input=1000, output=20, cached_input=896, reasons=("usage_inconsistent",)),
    ),
    "Moonshot": (chat(300, 30, 330, cached_tokens=256), STANDARD, Usage(input=300, output=30, cached_input=256)),
    "Groq": (
        chat(46, 10, 56, queue_time=0.04, prompt_time=0.002, completion_time=0.01, total_time=0.012),
        STANDARD,
        Usage(input=46, output=10),
    ),
    "Gemini, thoughts in the total alone": (chat(10, 5, 115), GEMINI, Usage(input=10, output=105, reasoning=100)),
    "Gemini native": (
        {
            "promptTokenCount": 10,
            "candidatesTokenCount": 5,
            "thoughtsTokenCount": 100,
            "cachedContentTokenCount": 4,
            "totalTokenCount": 115,
        },
        STANDARD,
        Usage(input=10, output=105, cached_input=4, reasoning=100),
    ),
    "Gemini native, prompts of tools": (
        {"promptTokenCount": 10, "candidatesTokenCount": 5, "toolUsePromptTokenCount": 7, "totalTokenCount": 22},
        STANDARD,
        Usage(input=17, output=5),
    ),
    "Gemini native, nothing but thoughts": (
        {"promptTokenCount": 10, "thoughtsTokenCount": 100, "totalTokenCount": 110},
        STANDARD,
        Usage(input=10, output=100, reasoning=100),
    ),
    "Vertex in Python": (
        {"prompt_token_count": 9, "candidates_token_count": 3, "thoughts_token_count": 8, "total_token_count": 20},
        STANDARD,
        Usage(input=9, output=11, reasoning=8),
    ),
    "a total that nobody explains": (
        chat(10, 5, 115),
        STANDARD,
        Usage(input=10, output=105, reasoning=100, reasons=("usage_total",)),
    ),
    "a total that is too small": (chat(10, 5, 11), STANDARD, Usage(input=10, output=5, reasons=("usage_total",))),
    "a total of 0": (chat(10, 5, 0), STANDARD, Usage(input=10, output=5)),
    "Mistral": (
        chat(13, 6, 19, prompt_audio_seconds=None, prompt_tokens_details={"cached_tokens": 0}),
        STANDARD,
        Usage(input=13, output=6),
    ),
    "Qwen, compatible": (
        chat(
            1500,
            300,
            1800,
            prompt_tokens_details={"cached_tokens": 1024, "cache_creation_input_tokens": 200},
            **details(reasoning_tokens=250, text_tokens=50),
        ),
        STANDARD,
        Usage(input=1500, output=300, cached_input=1024, cache_write=200, reasoning=250),
    ),
    "DashScope native": (
        {
            "input_tokens": 22,
            "output_tokens": 17,
            "total_tokens": 39,
            "prompt_tokens_details": {"cached_tokens": 8},
        },
        STANDARD,
        Usage(input=22, output=17, cached_input=8),
    ),
    "llama.cpp timings": (
        {"cache_n": 236, "prompt_n": 1, "prompt_ms": 30.9, "predicted_n": 35, "predicted_ms": 661.0},
        STANDARD,
        Usage(input=237, output=35, cached_input=236),
    ),
    "llama.cpp timings without a cache": ({"prompt_n": 12, "predicted_n": 3}, STANDARD, Usage(input=12, output=3)),
    "llama.cpp completion": ({"tokens_evaluated": 12, "tokens_predicted": 3}, STANDARD, Usage(input=12, output=3)),
    "Ollama": (
        {"prompt_eval_count": 26, "eval_count": 298, "eval_duration": 4_709_213_000},
        STANDARD,
        Usage(input=26, output=298),
    ),
    "vLLM": (chat(5, 2, 7, prompt_tokens_details=None), STANDARD, Usage(input=5, output=2)),
    "Perplexity": (
        chat(10, 20, 30, cost={"input_tokens_cost": 0.002, "total_cost": 0.01}, search_context_size="low"),
        PERPLEXITY,
        Usage(input=10, output=20, cost="0.01", currency="USD"),
    ),
    "Perplexity, reasoning outside of the total": (
        chat(33, 7163, 7196, citation_tokens=24_800, num_search_queries=19, reasoning_tokens=193_947),
        PERPLEXITY,
        Usage(input=33, output=201_110, reasoning=193_947),
    ),
    "OpenRouter": (
        chat(31, 14, 45, cost=Decimal("0.000004180000000000000001"), cost_details={"upstream_inference_cost": None}),
        OPENROUTER,
        Usage(input=31, output=14, cost="0.000004180000000000000001", currency="USD"),
    ),
    "OpenRouter, later": (
        {
            "tokens_prompt": 14,
            "tokens_completion": 3,
            "native_tokens_prompt": 12,
            "native_tokens_completion": 400,
            "native_tokens_reasoning": 380,
            "native_tokens_cached": 0,
            "total_cost": 0.0015,
        },
        OPENROUTER,
        Usage(input=12, output=400, reasoning=380, cost="0.0015", currency="USD"),
    ),
    "a cost of nobody's currency": (chat(1, 2, cost=3), STANDARD, Usage(input=1, output=2)),
    "a negative cost": (
        chat(1, 2, cost=-3),
        OPENROUTER,
        Usage(input=1, output=2, reasons=("usage_unreadable",)),
    ),
    "Cohere": (
        {
            "billed_units": {"input_tokens": 5.0, "output_tokens": 17.0},
            "tokens": {"input_tokens": 510, "output_tokens": 17},
            "cached_tokens": 128,
        },
        STANDARD,
        Usage(input=510, output=17, cached_input=128, billed_input=5, billed_output=17),
    ),
    "Cohere, billed units alone": (
        {"billed_units": {"input_tokens": 5, "output_tokens": 17}},
        STANDARD,
        Usage(input=5, output=17, billed_input=5, billed_output=17),
    ),
    "Cohere, zeros beside billed units": (
        {"billed_units": {"input_tokens": 5, "output_tokens": 17}, "tokens": {"input_tokens": 0, "output_tokens": 0}},
        STANDARD,
        Usage(input=5, output=17, billed_input=5, billed_output=17),
    ),
    "Anthropic": (
        {
            "input_tokens": 4,
            "cache_creation_input_tokens": 248,
            "cache_read_input_tokens": 1800,
            "cache_creation": {"ephemeral_5m_input_tokens": 148, "ephemeral_1h_input_tokens": 100},
            "output_tokens": 5,
            "server_tool_use": {"web_search_requests": 1},
            "service_tier": "standard",
        },
        STANDARD,
        Usage(input=2052, output=5, cached_input=1800, cache_write=248, cache_write_1h=100),
    ),
    "Anthropic, thinking": (
        {"input_tokens": 10, "output_tokens": 300, "output_tokens_details": {"thinking_tokens": 250}},
        STANDARD,
        Usage(input=10, output=300, reasoning=250),
    ),
    "Anthropic, lifetimes alone": (
        {"input_tokens": 40, "cache_creation": {"ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 2}},
        STANDARD,
        Usage(input=45, cache_write=5, cache_write_1h=2),
    ),
    "Anthropic, lifetimes beyond the sum": (
        {
            "input_tokens": 4,
            "cache_creation_input_tokens": 4,
            "cache_creation": {"ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 2},
            "output_tokens": 1,
        },
        STANDARD,
        Usage(input=9, output=1, cache_write=5, cache_write_1h=2, reasons=("usage_inconsistent",)),
    ),
    "Bedrock": (
        {
            "inputTokens": 10,
            "outputTokens": 5,
            "totalTokens": 115,
            "cacheReadInputTokens": 80,
            "cacheWriteInputTokens": 20,
        },
        STANDARD,
        Usage(input=110, output=5, cached_input=80, cache_write=20),
    ),
    "LiteLLM, Anthropic behind it": (
        chat(
            2052,
            5,
            2057,
            cache_read_input_tokens=1800,
            cache_creation_input_tokens=248,
            prompt_tokens_details={
                "cached_tokens": 1800,
                "cache_creation_tokens": 248,
                "cache_creation_token_details": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 248},
            },
        ),
        STANDARD,
        Usage(input=2052, output=5, cached_input=1800, cache_write=248, cache_write_1h=248),
    ),
    "a gateway that leaves cached tokens out": (
        chat(4, 5, 1809, cache_read_input_tokens=1800),
        STANDARD,
        Usage(input=1804, output=5, cached_input=1800),
    ),
    "cached tokens beyond the prompt and its total": (
        chat(10, 5, 15, prompt_tokens_details={"cached_tokens": 100}),
        STANDARD,
        Usage(input=110, output=5, cached_input=100),
    ),
    "floats": (chat(10.0, 5.0, 15.0), STANDARD, Usage(input=10, output=5)),
    "texts": (chat("10", " 5 ", "15.0"), STANDARD, Usage(input=10, output=5)),
    "nulls": (chat(10, None, None, prompt_tokens_details=None), STANDARD, Usage(input=10)),
    "no completion, but a total": ({"prompt_tokens": 10, "total_tokens": 15}, STANDARD, Usage(input=10, output=5)),
    "no prompt, but a total": ({"completion_tokens": 5, "total_tokens": 15}, STANDARD, Usage(input=10, output=5)),
    "a part of a token": (chat(10.5, 5), STANDARD, Usage(input=11, output=5, reasons=("usage_unreadable",))),
    "negative": (chat(12, -35), STANDARD, Usage(input=12, reasons=("usage_unreadable",))),
    "negative, but a total": (chat(12, -35, 40), STANDARD, Usage(input=12, output=28, reasons=("usage_unreadable",))),
    "huge": (chat(2**70, 3), STANDARD, Usage(output=3, reasons=("usage_unreadable",))),
    "not finite": (chat(float("inf"), 3), STANDARD, Usage(output=3, reasons=("usage_unreadable",))),
    "not numbers": (
        chat([1], {"a": 2}, True, cached_tokens=3),
        STANDARD,
        Usage(input=3, cached_input=3, reasons=("usage_unreadable",)),
    ),
    "all zero": (chat(0, 0, 0), STANDARD, Usage()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_provider_s_usage_is_read_into_nested_classes(case: str) -> None:
    raw, rules, expected = CASES[case]
    found = read_usage(raw, rules).usage
    assert found is not None
    assert msgspec.structs.replace(found, raw=None) == expected


@pytest.mark.parametrize("raw", [None, {}, [], "", 0, False])
def test_an_empty_object_is_no_usage(raw: Any) -> None:
    assert read_usage(raw) == (None, ())


@pytest.mark.parametrize("raw", ["10", 7, [chat(1, 2)], True, {"total_tokens": 30}, {"prompt_tokens": "many"}])
def test_usage_without_a_count_is_omitted_with_a_reason(raw: Any) -> None:
    assert read_usage(raw) == (None, ("usage_unreadable",))


def test_a_usage_object_too_large_for_an_event_is_not_stored() -> None:
    usage = read_usage(chat(1, 2, note="x" * 10_000)).usage
    assert usage == Usage(input=1, output=2, reasons=("usage_unreadable",))


@pytest.mark.parametrize(
    ("address", "rules"),
    [
        ("https://api.x.ai/v1", XAI),
        ("https://us-east-1.api.x.ai/v1", XAI),
        ("https://openrouter.ai/api/v1", OPENROUTER),
        ("https://x.ai.example.com/v1", STANDARD),
        ("http://localhost:8000", STANDARD),
        ("", STANDARD),
    ],
)
def test_usage_rules_are_selected_by_host(address: str, rules: UsageRules) -> None:
    assert rules_of(address) == rules


def test_choices_share_their_input() -> None:
    one, other = Usage(input=10, output=5, reasoning=2, raw={"a": 1}), Usage(input=10, output=7, cached_input=4)
    assert together([one, other]) == Usage(input=10, output=12, reasoning=2, cached_input=4)


def test_a_lookup_without_counts_is_no_usage() -> None:
    assert late_usage(b'{"data": {"native_tokens_prompt": 0, "native_tokens_completion": 0}}') is None
    assert late_usage(b'{"data": null}') is None
    assert late_usage(b"[]") is None
    found = late_usage(b'{"data": {"native_tokens_prompt": "12", "native_tokens_completion": 4.0}}')
    assert found is not None
    assert (found.input, found.output) == (12, 4)
