"""Test the requests of each dialect."""

from contextlib import suppress
from typing import Any

import msgspec
import pytest

from schemas.requests import Message
from services.producer.core.dialects import Dialect, UntranslatableCall, dialect_of
from services.producer.ports import UpstreamRequest

PIXEL = "data:image/png;base64,iVBORw0KGgo="
TOOL = {"type": "function", "function": {"name": "get_level", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_level", "arguments": '{"river": "Aare"}'}}
CONVERSATION = [
    Message("system", "Be brief."),
    Message("developer", "No lists."),
    Message("user", "How high?"),
    Message("assistant", None, tool_calls=[CALL]),
    Message("tool", "3 m", tool_call_id="c1"),
    Message("tool", "4 m", tool_call_id="c2"),
]


def call(messages: list[Message] | None = None, **params: Any) -> UpstreamRequest:
    return UpstreamRequest(model="m", messages=messages or [Message("user", "hi")], params=params)


def body(dialect: Dialect, asked: UpstreamRequest) -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.json.decode(dialect.request(asked, "https://h/v1", "k", {}).body)
    return decoded


@pytest.mark.parametrize(
    ("name", "base", "url"),
    [
        ("openai", "https://api.openai.com/v1", "https://api.openai.com/v1/chat/completions"),
        ("openai", "http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1/chat/completions"),
        ("openrouter", "https://openrouter.ai/api/v1", "https://openrouter.ai/api/v1/chat/completions"),
        ("anthropic", "https://api.anthropic.com", "https://api.anthropic.com/v1/messages"),
        ("anthropic", "https://gateway/anthropic/v1/", "https://gateway/anthropic/v1/messages"),
        ("cohere", "https://api.cohere.com", "https://api.cohere.com/v2/chat"),
        ("cohere", "https://api.cohere.com/v2", "https://api.cohere.com/v2/chat"),
    ],
)
def test_the_address_is_the_base_with_the_providers_path(name: Any, base: str, url: str) -> None:
    assert dialect_of(name).request(call(), base, None, {}).url == url


@pytest.mark.parametrize(
    ("name", "header", "value"),
    [
        ("openai", "authorization", "Bearer k-123"),
        ("openrouter", "authorization", "Bearer k-123"),
        ("anthropic", "x-api-key", "k-123"),
        ("cohere", "authorization", "Bearer k-123"),
    ],
)
def test_the_key_is_sent_where_there_is_one_and_never_shown(name: Any, header: str, value: str) -> None:
    dialect = dialect_of(name)
    asked = dialect.request(call(), "https://h", "k-123", {"X-Title": "t", "User-Agent": "mine"})
    assert asked.headers[header] == value
    assert (asked.headers["x-title"], asked.headers["user-agent"]) == ("t", "mine")
    assert asked.headers["accept-encoding"] == "identity"
    assert "k-123" not in repr(asked)
    assert header not in dialect.request(call(), "https://h", None, {}).headers


def test_openai_passes_parameters_through_except_reserved_ones() -> None:
    asked = call(
        temperature=0.5, n=2, model="other", messages=[], stream=False, stream_options={"include_usage": False}
    )
    assert body(dialect_of("openai"), asked) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0.5,
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert "stream_options" not in body(dialect_of("openai", include_usage=False), asked)


def test_anthropic_translates_a_conversation_with_tools() -> None:
    asked = body(
        dialect_of("anthropic"),
        call(CONVERSATION, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, stop="END", top_p=0.9),
    )
    assert asked == {
        "model": "m",
        "stream": True,
        "max_tokens": 4096,
        "top_p": 0.9,
        "stop_sequences": ["END"],
        "system": "Be brief.\n\nNo lists.",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "How high?"}]},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "c1", "name": "get_level", "input": {"river": "Aare"}}],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "3 m"}]},
                    {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "4 m"}]},
                ],
            },
        ],
        "tools": [{"name": "get_level", "description": "d", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_tokens": 7, "max_completion_tokens": 9}, {"max_tokens": 9}),
        ({"stop": ["a", "b"]}, {"stop_sequences": ["a", "b"]}),
        ({"user": "u1"}, {"metadata": {"user_id": "u1"}}),
        ({"tools": [TOOL], "tool_choice": "none"}, {"tool_choice": {"type": "none"}}),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "get_level"}}},
            {"tool_choice": {"type": "tool", "name": "get_level"}},
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        ),
        ({"frequency_penalty": 1, "logit_bias": {}}, {}),
    ],
)
def test_anthropic_translates_parameters(params: dict[str, Any], expected: dict[str, Any]) -> None:
    asked = body(dialect_of("anthropic"), call(**params))
    assert {name: asked[name] for name in expected} == expected
    assert "logit_bias" not in asked


def test_anthropic_takes_images_as_data_or_address() -> None:
    content = [
        {"type": "text", "text": "what?"},
        {"type": "text", "text": ""},
        {"type": "image_url", "image_url": {"url": PIXEL}},
        {"type": "image_url", "image_url": {"url": "https://h/x.png"}},
    ]
    assert body(dialect_of("anthropic"), call([Message("user", content)]))["messages"][0]["content"] == [
        {"type": "text", "text": "what?"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
        {"type": "image", "source": {"type": "url", "url": "https://h/x.png"}},
    ]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (call(n=2), "only n=1"),
        (call([Message("user", [{"type": "input_audio"}])]), "'input_audio' is not supported"),
        (call([Message("user", [{"type": "image_url", "image_url": {"url": "data:,x"}}])]), "base64"),
        (call([Message("assistant", tool_calls=[{"function": {"arguments": "{"}}])]), "not JSON"),
        (call(tools=[TOOL], tool_choice="perhaps"), "'perhaps' is unknown"),
    ],
)
def test_anthropic_refuses_untranslatable_parameters(asked: UpstreamRequest, said: str) -> None:
    with pytest.raises(UntranslatableCall, match=said):
        dialect_of("anthropic").request(asked, "https://h", None, {})


def test_cohere_translates_a_conversation_with_tools() -> None:
    asked = body(
        dialect_of("cohere"),
        call(
            CONVERSATION,
            tools=[TOOL, {"type": "function", "function": {"name": "other"}}],
            tool_choice={"type": "function", "function": {"name": "get_level"}},
            max_completion_tokens=50,
            top_p=0.9,
            stop="END",
            response_format={"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
            logit_bias={},
        ),
    )
    assert asked == {
        "model": "m",
        "stream": True,
        "max_tokens": 50,
        "p": 0.9,
        "stop_sequences": ["END"],
        "response_format": {"type": "json_object", "json_schema": {"type": "object"}},
        "tools": [TOOL],
        "tool_choice": "REQUIRED",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "system", "content": "No lists."},
            {"role": "user", "content": "How high?"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "3 m", "tool_call_id": "c1"},
            {"role": "tool", "content": "4 m", "tool_call_id": "c2"},
        ],
    }


def test_cohere_refuses_several_answers() -> None:
    with pytest.raises(UntranslatableCall, match="n=3"):
        dialect_of("cohere").request(call(n=3), "https://h", None, {})


@pytest.mark.parametrize("params", [{"tools": 3}, {"tools": ["x"]}, {"stop": 3}, {"response_format": 3}])
@pytest.mark.parametrize("name", ["openai", "anthropic", "cohere"])
def test_parameters_of_the_wrong_type_are_sent_or_refused_but_never_crash(name: Any, params: dict[str, Any]) -> None:
    with suppress(UntranslatableCall):
        dialect_of(name).request(call(**params), "https://h", None, {})
