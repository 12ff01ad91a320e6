"""Test the ends of streams, and complete answers instead of a stream."""

import json
from typing import Any

import pytest

from tests.support.foreign_streams import (
    COHERE_END,
    COHERE_START,
    DONE,
    HELLO,
    MESSAGE_END,
    MESSAGE_START,
    STOP,
    TEXT_START,
    TEXT_STOP,
    USAGE,
    chunk,
    cohere_delta,
    data,
    named,
    outcome,
    stream,
    text_delta,
    usage_chunk,
)

ANTHROPIC = named(MESSAGE_START, TEXT_START, text_delta("Hello"), TEXT_STOP, MESSAGE_END)
COHERE = named(COHERE_START, cohere_delta("Hello"), COHERE_END)


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        ("openai", stream(HELLO, STOP, usage_chunk(), done=False)),
        ("openai", stream(HELLO, STOP, usage_chunk(), done=False)[:-1]),
        ("openai", stream(HELLO, STOP, usage_chunk(), done=False)[:-2]),
        ("openai", stream(HELLO, STOP, usage_chunk(), done=False) + b"data: [DONE]"),
        ("openai", stream(HELLO, STOP, usage_chunk(), done=False) + b"data: [DONE]\r\n"),
        ("openai", stream(HELLO, STOP, usage_chunk(), done=False) + b"data:[DONE] \n\n"),
        ("openai", stream(HELLO, STOP, usage_chunk(), done=False) + b"data: [done]\n\n"),
        ("openai", stream(HELLO, STOP, usage_chunk(), done=False) + b"[DONE]\n"),
        ("openai", stream(HELLO, STOP, usage_chunk(), done=False) + b": bye\n\nid: 9\n"),
        ("openai", stream(HELLO, usage_chunk(), done=False) + b"data: [DONE]"),
        ("openai", stream(HELLO, STOP, usage_chunk()).replace(b"\n\n", b"\n")),
        ("openai", b"\n".join(json.dumps(event).encode() for event in (HELLO, STOP, usage_chunk()))),
        ("openai", b"\n".join(json.dumps(event).encode() for event in (HELLO, STOP, usage_chunk())) + b"\n[DONE]\n"),
        ("openai", b"".join(json.dumps(event).encode() + b"\r\n\r\n" for event in (HELLO, STOP, usage_chunk()))),
        ("openai", json.dumps([HELLO, STOP, usage_chunk()], indent=1).encode()),
        ("anthropic", ANTHROPIC),
        ("anthropic", ANTHROPIC + named({"type": "message_stop"})[:-2]),
        ("anthropic", ANTHROPIC + named({"type": "message_stop"})[:-1]),
        ("anthropic", ANTHROPIC + DONE),
        ("anthropic", (ANTHROPIC + named({"type": "message_stop"})).replace(b"data: ", b"data:")),
        ("cohere", COHERE[:-1]),
        ("cohere", COHERE[:-2]),
    ],
)
def test_an_answer_that_is_finished_is_complete_at_a_clean_end_of_its_body(dialect: str, body: bytes) -> None:
    came = outcome(dialect, body)
    assert (came.code, came.text) == ("completed", "Hello")
    assert came.usage is not None
    assert came.usage.output == 5


TWO = [{"choices": [{"index": n, "delta": {"content": "Hello"}, "finish_reason": None}]} for n in (0, 1)]


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        ("openai", stream(HELLO, done=False)),
        ("openai", stream(HELLO, usage_chunk(), done=False)),
        ("openai", stream(*TWO, STOP, done=False)),
        ("openai", stream(HELLO, STOP, done=False) + b'data: {"choices":[],"usage":{"pro'),
        ("openai", stream(HELLO, STOP, done=False) + b'data: {"error":{"mess'),
        ("openai", b"\n".join(json.dumps(event).encode() for event in (HELLO, STOP))[:-3]),
        ("openai", json.dumps(HELLO).encode()),
        ("anthropic", named(MESSAGE_START, TEXT_START, text_delta("Hello"), TEXT_STOP)),
        ("anthropic", named(MESSAGE_START, TEXT_START, text_delta("Hello"), TEXT_STOP) + DONE),
        ("cohere", named(COHERE_START, cohere_delta("Hello"))),
        ("cohere", named(COHERE_START, cohere_delta("Hello")) + DONE),
    ],
)
def test_an_answer_that_is_not_finished_is_cut_off(dialect: str, body: bytes) -> None:
    came = outcome(dialect, body)
    assert came.failure is not None
    assert (came.code, came.failure.recoverable) == ("upstream_cut_off", True)
    assert came.text


def test_the_rest_of_an_event_that_was_cut_is_in_the_message() -> None:
    came = outcome("openai", stream(HELLO, STOP, done=False) + b'data: {"error":{"mess')
    assert came.failure is not None
    assert came.failure.message == "the provider's stream ended without its end marker: '{\"error\":{\"mess'"


@pytest.mark.parametrize(
    ("dialect", "body"),
    [("openai", stream(HELLO, STOP, usage_chunk(), done=False)), ("anthropic", ANTHROPIC)],
)
def test_a_broken_connection_cuts_off_an_answer_without_its_end_marker(dialect: str, body: bytes) -> None:
    came = outcome(dialect, body, broken="reset by peer")
    assert came.failure is not None
    assert (came.code, came.failure.message) == ("upstream_cut_off", "the connection broke: reset by peer")


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        ("openai", stream(HELLO, STOP)[:-2]),
        ("anthropic", ANTHROPIC + named({"type": "message_stop"})[:-2]),
        ("cohere", COHERE[:-2]),
    ],
)
def test_an_end_marker_counts_before_a_broken_connection(dialect: str, body: bytes) -> None:
    assert outcome(dialect, body, broken="reset by peer").completed


def completion(message: dict[str, Any], finish: str | None = "stop", **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": USAGE,
    } | fields


CALLS = [
    {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
    {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
]


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(completion({"content": "Hello"})).encode(),
        json.dumps(completion({"content": "Hello"}), indent=4).encode() + b"\n",
        b"\xef\xbb\xbf\r\n\r\n" + json.dumps(completion({"content": "Hello"})).encode(),
        json.dumps(completion({"content": "Hello"}, finish=None)).encode(),
        json.dumps([completion({"content": "Hello"})]).encode(),
        stream(completion({"content": "Hello"})),
        stream(completion({"content": "Hello"}), done=False),
        stream(HELLO, completion({"content": "Hello"}, base_resp={"status_code": 0, "status_msg": ""})),
        json.dumps(completion({"content": [{"type": "text", "text": "Hello"}]})).encode(),
        json.dumps(completion({"content": "Hello"}, error=None)).encode(),
    ],
)
def test_a_chat_completion_is_an_answer(body: bytes) -> None:
    came = outcome("openai", body)
    assert (came.code, came.text, came.finish) == ("completed", "Hello", ["stop"])
    assert came.usage is not None
    assert (came.usage.input, came.usage.output) == (7, 5)


def test_a_chat_completion_with_reasoning_and_calls() -> None:
    message = {"content": None, "reasoning_content": "hm", "tool_calls": CALLS}
    came = outcome("openai", json.dumps(completion(message, finish=None)).encode())
    assert (came.code, came.reasoning, came.names) == ("completed", "hm", ["f", "g"])
    assert (came.arguments, came.finish) == ('{"a":1}{}', ["tool_calls"])


def test_a_text_completion_stream_is_an_answer() -> None:
    events = [{"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in ("Hel", "lo")]
    came = outcome("openai", stream(*events, {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}))
    assert (came.code, came.text, came.finish) == ("completed", "Hello", ["stop"])


def test_messages_instead_of_deltas_are_joined() -> None:
    events = [{**chunk(), "choices": [{"index": 0, "message": {"content": text}}]} for text in ("Hel", "lo")]
    came = outcome("openai", stream(*events, STOP))
    assert (came.code, came.text, came.finish) == ("completed", "Hello", ["stop"])


@pytest.mark.parametrize("indent", [None, 2])
def test_an_anthropic_message_is_an_answer(indent: int | None) -> None:
    content = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "Hello"},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "u", "name": "g", "input": {}},
    ]
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": content}
    ending = {"stop_reason": "tool_use", "usage": {"input_tokens": 15, "output_tokens": 5}}
    for body in (json.dumps({**message, **ending}, indent=indent).encode(), data({**message, **ending})):
        came = outcome("anthropic", body)
        assert (came.code, came.text, came.reasoning, came.names) == ("completed", "Hello", "hm", ["f", "g"])
        assert (came.arguments, came.finish) == ('{"a":1}{}', ["tool_calls"])
        assert came.usage is not None
        assert (came.usage.input, came.usage.output) == (15, 5)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_cohere_answer_is_an_answer(indent: int | None) -> None:
    message = {
        "role": "assistant",
        "tool_plan": "hm",
        "tool_calls": CALLS,
        "content": [{"type": "text", "text": "Hello"}],
    }
    answer = {"id": "c1", "message": message, "finish_reason": "TOOL_CALL", "usage": COHERE_END["delta"]["usage"]}  # type: ignore[index]  # a dict
    for body in (json.dumps(answer, indent=indent).encode(), data(answer)):
        came = outcome("cohere", body)
        assert (came.code, came.text, came.reasoning, came.names) == ("completed", "Hello", "hm", ["f", "g"])
        assert (came.arguments, came.finish) == ('{"a":1}{}', ["tool_calls"])
        assert came.usage is not None
        assert (came.usage.input, came.usage.output) == (7, 5)


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "cohere"])
def test_a_whole_answer_that_was_cut_is_cut_off(dialect: str) -> None:
    came = outcome(dialect, json.dumps(completion({"content": "Hello " * 20})).encode()[:-9])
    assert came.failure is not None
    assert (came.code, came.failure.recoverable) == ("upstream_cut_off", True)
    assert "Hello" in came.failure.message


def test_a_whole_answer_with_nothing_in_it_is_no_success() -> None:
    assert outcome("cohere", b'{"id":"c","message":{"role":"assistant"}}').code == "upstream_error"
    assert outcome("anthropic", b'{"type":"message","content":[]}').code == "upstream_error"
