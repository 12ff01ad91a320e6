"""Test fields of a wrong type: metadata is converted or omitted, content is malformed."""

from typing import Any

import pytest

from services.producer.core.parts import ExtraPart
from tests.support.foreign_streams import (
    COHERE_END,
    COHERE_START,
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

CALL = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


@pytest.mark.parametrize(
    "event",
    [
        b"null",
        b'{"choices":[{"index":null,"delta":{"content":"Hello"}}]}',
        b'{"choices":[{"index":"0","delta":{"content":"Hello"}}]}',
        b'{"choices":[{"index":0.0,"delta":{"content":"Hello"}}]}',
        b'{"choices":[null,{"index":0,"delta":{"content":"Hello"}}]}',
        b'{"choices":{"index":0,"delta":{"content":"Hello"}}}',
        b'{"choices":[{"delta":{"content":"Hello"},"logprobs":{"content":[{"token":"a","logprob":-Infinity}]}}]}',
        b'{"choices":[{"delta":{"content":"Hello"},"logprobs":NaN}]}',
        b'{"choices":[{"delta":{"content":"Hello"}}],"created":Infinity}',
        b'{"choices":[{"delta":{"content":"Hello"}}],"created":"1764870123"}',
        b'{"choices":[{"delta":{"content":"Hello"}}],"created":1e999}',
        b'{"choices":[{"delta":{"content":"Hello"}}],"id":12,"model":7}',
        b'{"choices":[{"delta":{"content":"Hello","tool_calls":[null]}}]}',
        b'{"choices":[{"delta":{"content":{"type":"text","text":"Hello"}}}]}',
        b'{"choices":[{"delta":{"content":"Hello"}}],"x_note":"a\tb"}',
        b'[{"choices":[{"delta":{"content":"Hello"}}]}]',
    ],
)
def test_a_convertible_field_is_relayed_without_a_notice(event: bytes) -> None:
    came = outcome("openai", stream(event, STOP, usage_chunk()))
    assert came.completed
    assert came.text == ("" if event == b"null" else "Hello")
    assert came.notices == []
    assert came.usage is not None


@pytest.mark.parametrize(
    ("event", "path"),
    [
        (
            {"choices": [{"delta": {"content": "Hello"}, "finish_reason": {"type": "stop"}}]},
            "$.choices[0].finish_reason",
        ),
        ({"choices": [{"delta": {"content": "Hello"}}], "created": "now"}, "$.created"),
        ({"choices": [{"delta": {"content": "Hello"}}], "id": ["c"]}, "$.id"),
    ],
)
def test_an_unconvertible_field_is_omitted_with_one_notice(event: dict[str, Any], path: str) -> None:
    came = outcome("openai", stream(event, {**event, "choices": [{"delta": {"content": "!"}}]}, STOP))
    assert (came.completed, came.text) == (True, "Hello!")
    [notice] = came.notices
    assert notice.code == "upstream_malformed_fields"
    assert path in notice.message


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 10.0, "completion_tokens": 2}, (10, 2)),
        ({"prompt_tokens": "10", "completion_tokens": "2"}, (10, 2)),
        ({"prompt_tokens": 10, "completion_tokens": 2, "cost": {"total_cost": 0.01}}, (10, 2)),
        ({"prompt_tokens": 10, "completion_tokens": None, "prompt_tokens_details": []}, (10, 0)),
        ({"prompt_tokens": 10, "completion_tokens": 2, "completion_tokens_details": "none"}, (10, 2)),
    ],
)
@pytest.mark.parametrize("dialect", ["openai", "openrouter"])
def test_usage_never_fails_an_answer(dialect: str, usage: dict[str, Any], counts: tuple[int, int]) -> None:
    came = outcome(dialect, stream(HELLO, STOP, usage_chunk(**usage)))
    assert came.completed
    assert came.text == "Hello"
    assert came.usage is not None
    assert (came.usage.input, came.usage.output) == counts


@pytest.mark.parametrize("wrong", [b'"\\ud83d"', b"NaN", b"1e999", b"[{}]", b"-1.5", b"12345678901234567890123"])
def test_usage_of_any_value_never_fails_an_answer(wrong: bytes) -> None:
    usage = b'{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5,"odd":%s,"cost":%s}}' % (wrong, wrong)
    came = outcome("openrouter", stream(HELLO, STOP, usage))
    assert came.completed
    assert came.usage is not None
    assert (came.usage.input, came.usage.output) == (7, 5)


def test_tool_calls_in_an_odd_event_are_relayed() -> None:
    came = outcome("openai", stream({**chunk(tool_calls=[CALL]), "created": []}, chunk("tool_calls")))
    assert (came.completed, came.names, came.arguments) == (True, ["f"], '{"a":1}')


@pytest.mark.parametrize(
    "delta",
    [
        {"content": 12},
        {"content": True},
    ],
)
def test_content_of_a_wrong_type_is_malformed(delta: dict[str, Any]) -> None:
    came = outcome("openai", stream(HELLO, chunk(**delta), STOP))
    assert (came.code, came.text) == ("upstream_malformed", "Hello")


@pytest.mark.parametrize(
    "calls",
    ["f", [17], [{"index": 0, "function": "f"}], [{"index": 0, "function": {"name": {}}}]],
)
def test_tool_calls_of_a_wrong_type_are_kept_as_extra(calls: Any) -> None:
    came = outcome("openai", stream(HELLO, chunk(tool_calls=calls), STOP))
    assert (came.completed, came.text, came.names) == (True, "Hello", [])
    [extra] = [part.extra for part in came.parts if isinstance(part, ExtraPart)]
    assert (extra.kind, extra.data) == ("tool_calls", calls[0] if isinstance(calls, list) else calls)


def test_reasoning_as_a_list_is_read() -> None:
    came = outcome("openai", stream(HELLO, chunk(reasoning_content=["x"]), STOP))
    assert (came.completed, came.reasoning) == (True, "x")


@pytest.mark.parametrize("event", [{"choices": 3}, {"choices": [17]}, {"choices": [{"delta": "Hello"}]}])
def test_choices_of_a_wrong_type_are_malformed(event: dict[str, Any]) -> None:
    assert outcome("openai", stream(HELLO, event, STOP)).code == "upstream_malformed"


@pytest.mark.parametrize(
    "event",
    [
        {**text_delta("Hello"), "index": None},
        {**text_delta("Hello"), "index": "0"},
        {**text_delta("Hello"), "usage": []},
        {**text_delta("Hello"), "message": None},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hello", "stop_reason": {}}},
    ],
)
def test_odd_fields_of_an_anthropic_stream(event: dict[str, Any]) -> None:
    ending = {**MESSAGE_END, "usage": {"output_tokens": 5.0, "input_tokens": None, "cache_read_input_tokens": {}}}
    body = named(MESSAGE_START, TEXT_START) + data(event) + data(b"null") + named(TEXT_STOP, ending)
    came = outcome("anthropic", body + named({"type": "message_stop"}))
    assert (came.completed, came.text) == (True, "Hello")
    assert came.usage is not None
    assert (came.usage.input, came.usage.output) == (15, 5)


@pytest.mark.parametrize(
    "event",
    [
        {**cohere_delta("Hello"), "index": None},
        {**cohere_delta("Hello"), "id": 7},
        {**cohere_delta("Hello"), "index": {}},
        {"type": "content-delta", "delta": {"usage": 5, "message": {"content": {"text": "Hello"}}}},
    ],
)
def test_odd_fields_of_a_cohere_stream(event: dict[str, Any]) -> None:
    usage = {"tokens": {"input_tokens": "7", "output_tokens": 5.0}, "billed_units": [], "cached_tokens": {}}
    ending = {"type": "message-end", "delta": {**COHERE_END["delta"], "usage": usage}}  # type: ignore[dict-item]  # a dict
    came = outcome("cohere", named(COHERE_START) + data(event) + data(b"null") + named(ending))
    assert (came.completed, came.text) == (True, "Hello")
    assert came.usage is not None
    assert (came.usage.input, came.usage.output) == (7, 5)


@pytest.mark.parametrize("dialect", ["anthropic", "cohere"])
def test_content_of_a_wrong_type_is_malformed_for_anthropic_and_cohere(dialect: str) -> None:
    events: dict[str, Any] = {
        "anthropic": {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": 5}},
        "cohere": {"type": "content-delta", "delta": {"message": {"content": {"text": []}}}},
    }
    assert outcome(dialect, data(events[dialect])).code == "upstream_malformed"


def test_raw_usage_keeps_unreadable_fields() -> None:
    came = outcome("openai", stream(HELLO, STOP, usage_chunk(**USAGE, cost={"total_cost": 0.01})))
    assert came.usage is not None
    assert came.usage.raw == {**USAGE, "cost": {"total_cost": 0.01}}
