"""Text that strict JSON refuses: halves of surrogate pairs, and bytes that are no UTF-8."""

import pytest

from services.producer.core.parts import Reasoning, Text
from tests.support.foreign_streams import COHERE_END, MESSAGE_END, STOP, chunk, data, named, outcome, parser_of, stream


def delta(inner: bytes, index: int = 0) -> bytes:
    return b'{"choices":[{"index":%d,"delta":{%s}}]}' % (index, inner)


def content(text: bytes, index: int = 0) -> bytes:
    return delta(b'"content":"%s"' % text, index)


TEXTS: list[tuple[list[bytes], str]] = [
    ([rb"a\ud83d", rb"\ude00b"], "a😀b"),
    ([rb"a\ud83d\ude00b"], "a😀b"),
    ([rb"a\ud83d", b"", rb"\ude00b"], "a😀b"),
    ([rb"a\ud83d", b"b"], "a\ufffdb"),
    ([rb"a\ud83d"], "a\ufffd"),
    ([rb"\ude00b"], "\ufffdb"),
    ([b"a", rb"\ude00b"], "a\ufffdb"),
    ([rb"a\ud83db"], "a\ufffdb"),
    ([rb"a\ude00\ud83db"], "a\ufffd\ufffdb"),
    ([rb"\ud83d", rb"\ud83d", rb"\ude00"], "\ufffd😀"),
    ([rb"\ud83d\n", rb"\ude00"], "\ufffd\n\ufffd"),
    ([b"a\xff\xfeb"], "a\ufffd\ufffdb"),
    ([b"a\xf0\x9f\x98b"], "a\ufffdb"),
    ([b"a\xed\xa0\xbdb"], "a\ufffd\ufffd\ufffdb"),
    ([b"a\x00b\x1f"], "a\x00b\x1f"),
]


@pytest.mark.parametrize(("texts", "expected"), TEXTS)
def test_answer_text(texts: list[bytes], expected: str) -> None:
    came = outcome("openai", stream(*map(content, texts), STOP))
    assert (came.completed, came.text) == (True, expected)


@pytest.mark.parametrize(("texts", "expected"), TEXTS)
def test_reasoning(texts: list[bytes], expected: str) -> None:
    came = outcome("openai", stream(*(delta(b'"reasoning_content":"%s"' % text) for text in texts), STOP))
    assert (came.completed, came.reasoning) == (True, expected)


@pytest.mark.parametrize(("texts", "expected"), TEXTS)
def test_tool_arguments(texts: list[bytes], expected: str) -> None:
    calls = [delta(b'"tool_calls":[{"index":0,"function":{"arguments":"%s"}}]' % text) for text in texts]
    begin = chunk(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}])
    came = outcome("openai", stream(begin, *calls, chunk("tool_calls")))
    assert (came.completed, came.arguments) == (True, expected)


@pytest.mark.parametrize(("texts", "expected"), TEXTS)
def test_anthropic_text_thinking_and_arguments(texts: list[bytes], expected: str) -> None:
    kinds = (("text_delta", "text", "text"), ("thinking_delta", "thinking", "thinking"))
    for kind, field, block in (*kinds, ("input_json_delta", "partial_json", "tool_use")):
        begin = {"type": "content_block_start", "index": 0, "content_block": {"type": block, "id": "t", "name": "f"}}
        events = [
            b'{"type":"content_block_delta","index":0,"delta":{"type":"%s","%s":"%s"}}'
            % (kind.encode(), field.encode(), text)
            for text in texts
        ]
        body = named(begin) + b"".join(map(data, events)) + named(MESSAGE_END, {"type": "message_stop"})
        came = outcome("anthropic", body)
        assert (came.completed, came.text + came.reasoning + came.arguments) == (True, expected)


@pytest.mark.parametrize(("texts", "expected"), TEXTS)
def test_cohere_text(texts: list[bytes], expected: str) -> None:
    events = [b'{"type":"content-delta","delta":{"message":{"content":{"text":"%s"}}}}' % text for text in texts]
    came = outcome("cohere", b"".join(map(data, events)) + named(COHERE_END))
    assert (came.completed, came.text) == (True, expected)


def test_halves_of_choices_and_kinds_are_joined_apart() -> None:
    reasoning = b'"reasoning_content":"%s"'
    events = [
        content(rb"a\ud83d"),
        content(rb"b\ud83c", 1),
        delta(reasoning % rb"c\ud83d"),
        content(rb"\udf0a", 1),
        content(rb"\ude00"),
        delta(reasoning % rb"\ude01"),
    ]
    parser = parser_of("openai")
    parts = [*parser.feed(stream(*events, STOP, done=False)), *parser.finish()]
    texts = {n: "".join(p.text for p in parts if isinstance(p, Text) and p.choice == n) for n in (0, 1)}
    assert texts == {0: "a😀", 1: "b🌊"}
    assert "".join(p.text for p in parts if isinstance(p, Reasoning)) == "c😁"


def test_a_name_or_id_with_half_a_pair_can_be_written() -> None:
    call = rb'"tool_calls":[{"index":0,"id":"a\ud83d","function":{"name":"f\ud83d","arguments":"{}"}}]'
    came = outcome("openai", stream(delta(call), b'{"id":"\\ude00","model":"m\\ud83d","choices":[]}', STOP))
    assert came.completed
    assert "\ud83d" not in came.names[0]
    assert came.names[0].startswith("f")


def test_a_pending_surrogate_half_is_replaced_when_the_connection_breaks() -> None:
    came = outcome("openai", stream(content(rb"a\ud83d"), done=False), broken="reset")
    assert (came.code, came.text) == ("upstream_cut_off", "a\ufffd")
