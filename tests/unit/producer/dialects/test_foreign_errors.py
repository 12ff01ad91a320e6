"""Test errors in the shapes of common servers: each fails the answer with a code and the server's message."""

import json
from typing import Any

import pytest

from tests.support.foreign_streams import (
    COHERE_START,
    DONE,
    HELLO,
    MESSAGE_START,
    STOP,
    TEXT_START,
    chunk,
    cohere_delta,
    data,
    named,
    outcome,
    parser_of,
    stream,
    text_delta,
    usage_chunk,
)

BAD, LIMITED, ERROR = "upstream_bad_request", "upstream_rate_limited", "upstream_error"
UNAUTHORIZED, OVERLOADED, TOO_LONG = "upstream_unauthorized", "upstream_overloaded", "context_length_exceeded"

EVENTS: list[tuple[Any, str, str, int | None, bool]] = [
    ({"object": "error", "message": "boom", "code": 400}, BAD, "boom", 400, False),
    ({"object": "error", "message": "boom", "type": "InternalServerError", "code": 500}, ERROR, "boom", 500, True),
    ({"choices": None, "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
     UNAUTHORIZED, "insufficient balance", None, False),
    ({"choices": [], "base_resp": {"status_code": 1002, "status_msg": "wait"}}, LIMITED, "wait", None, True),
    ({"base_resp": {"status_code": 2013, "status_msg": "bad role"}}, BAD, "bad role", None, False),
    ({"error": "Model is overloaded", "error_type": "overloaded"}, OVERLOADED, "Model is overloaded", None, True),
    ({"error": "it broke"}, ERROR, "it broke", None, True),
    ({"error": {}}, ERROR, '{"error":{}}', None, True),
    ({"error": " "}, ERROR, '{"error":" "}', None, True),
    ({"message": "half \ud800"}, ERROR, "half \ufffd", None, True),
    ({"error": True}, ERROR, '{"error":true}', None, True),
    ({"error": {"code": "429", "message": "slow down"}, "choices": []}, LIMITED, "slow down", 429, True),
    ({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "no more"}}, LIMITED, "no more", 429, True),
    ([{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "no"}}], BAD, "no", 400, False),
    ({"error": {"code": 400, "type": "exceed_context_size_error", "message": "too big"}},
     TOO_LONG, "too big", 400, False),
    ({"errors": [{"message": "nope", "code": "rate_limit_exceeded"}]}, LIMITED, "nope", None, True),
    ({"errors": ["nope"]}, ERROR, "nope", None, True),
    ({"detail": "Not authenticated: invalid API key"}, UNAUTHORIZED, "Not authenticated: invalid API key", None, False),
    ({"detail": [{"loc": ["body", "top_k"], "msg": "not a number", "type": "float_type"}]},
     BAD, "body.top_k: not a number", None, False),
    ({"code": "InvalidApiKey", "message": "no such key", "request_id": "r"}, UNAUTHORIZED, "no such key", None, False),
    ({"error_code": 336103, "error_msg": "prompt tokens too long"}, TOO_LONG, "prompt tokens too long", None, False),
    ({"header": {"code": 10012, "message": "engine failed"}}, ERROR, "engine failed", None, True),
    ({"__type": "ThrottlingException", "message": "slow"}, LIMITED, "slow", None, True),
    ({"message": "internal server error"}, ERROR, "internal server error", None, True),
    ({"success": False, "msg": "not now"}, ERROR, "not now", None, True),
    ({"status": 503, "title": "down"}, OVERLOADED, "down", 503, True),
    ({"type": "response.failed", "response": {"error": {"code": "server_error", "message": "sorry"}}},
     ERROR, "sorry", None, True),
    (chunk("error"), ERROR, "the answer ended with 'error'", None, True),
    (chunk("ERROR"), ERROR, "the answer ended with 'ERROR'", None, True),
    (chunk("abort"), ERROR, "the answer ended with 'abort'", None, True),
    (chunk("insufficient_system_resource"), OVERLOADED, "the answer ended with 'insufficient_system_resource'",
     None, True),
    ({"choices": [{"index": 0, "delta": {}, "finish_reason": "error", "error": {"code": 502, "message": "it died"}}]},
     ERROR, "it died", 502, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("event", "code", "message", "status", "recoverable"), EVENTS, ids=lambda value: str(value)[:40]
)
def test_an_error_in_an_event_fails_the_answer(
    event: Any, code: str, message: str, status: int | None, recoverable: bool
) -> None:
    for body in (stream(HELLO, event), stream(HELLO, event, STOP, usage_chunk()), stream(HELLO, event, done=False)):
        came = outcome("openai", body)
        assert came.failure is not None
        assert (came.text, came.code, came.failure.message) == ("Hello", code, message)
        assert (came.failure.upstream_status, came.failure.recoverable) == (status, recoverable)


OUT_OF_EVENTS: list[tuple[bytes, str, str]] = [
    (b'error: {"code":500,"message":"boom"}\n\n', ERROR, "boom"),
    (b"error: boom\n\n", ERROR, "boom"),
    (b'Error: {"code":429,"message":"slow"}\n\n', LIMITED, "slow"),
    (b'event: error\ndata: {"message":"boom"}\n\n', ERROR, "boom"),
    (b"event: error\ndata: Rate limit exceeded\n\n", LIMITED, "Rate limit exceeded"),
    (b"event: error\n\n", ERROR, "error"),
    (b"event: stream_error\ndata:\n\n", ERROR, "the provider reported an error without details"),
    (b'{"error":{"message":"raw","code":401}}\n\n', UNAUTHORIZED, "raw"),
    (b'{\n  "error": {\n    "message": "raw"\n  }\n}\n\n', ERROR, "raw"),
    (b'[{"error":{"message":"raw"}}]\n\n', ERROR, "raw"),
    (b"data: service unavailable\n\n", OVERLOADED, "service unavailable"),
]


@pytest.mark.parametrize(("lines", "code", "message"), OUT_OF_EVENTS, ids=lambda value: str(value)[:40])
def test_an_error_line_outside_events_fails_the_answer(lines: bytes, code: str, message: str) -> None:
    for body in (stream(HELLO, done=False) + lines + DONE, stream(HELLO, done=False) + lines, lines + DONE):
        came = outcome("openai", body)
        assert came.failure is not None
        assert (came.code, came.failure.message) == (code, message)


@pytest.mark.parametrize("last", [b"", b"\n", b"\n\n"])
def test_text_behind_the_last_event_is_in_the_message(last: bytes) -> None:
    text = b"upstream connect error or disconnect/reset before headers"
    for body in (stream(HELLO, done=False) + text + last, stream(HELLO, STOP, done=False) + text + last):
        came = outcome("openai", body)
        assert came.code == "upstream_cut_off"
        assert came.failure is not None
        assert text.decode() in came.failure.message


def test_plain_text_instead_of_a_finish_reason_fails_the_answer_despite_an_end_marker() -> None:
    came = outcome("openai", stream(HELLO, done=False) + b"worker died\n\n" + DONE)
    assert came.failure is not None
    assert (came.code, "worker died" in came.failure.message) == ("upstream_cut_off", True)


def test_text_in_the_middle_of_an_answer_that_is_finished_is_a_notice() -> None:
    came = outcome("openai", stream(HELLO, done=False) + b"retrying in 3 s\n\n" + stream(STOP))
    assert came.completed
    [notice] = came.notices
    assert notice.code == "upstream_unknown_event"
    assert "retrying in 3 s" in notice.message


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"no upstream", "upstream_malformed"),
        (b"Rate limit exceeded, try again later", LIMITED),
        (b"<html><body>503 Service Temporarily Unavailable</body></html>", OVERLOADED),
        (b"<html><body>please log in</body></html>", "upstream_malformed"),
        (b'{"choices": []}', "upstream_malformed"),
        (b'{"id": "job-1", "state": "queued"}', "upstream_malformed"),
        (b"", "upstream_cut_off"),
    ],
)
@pytest.mark.parametrize("dialect", ["openai", "openrouter", "anthropic", "cohere"])
def test_a_body_that_is_no_stream_is_quoted_in_the_failure(dialect: str, body: bytes, code: str) -> None:
    came = outcome(dialect, body)
    assert came.code == code
    assert came.failure is not None
    assert body.decode()[:40] in came.failure.message


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        ("openai", DONE),
        ("openai", b"[DONE]"),
        ("openai", stream({"id": "c", "choices": []})),
        ("openrouter", b": OPENROUTER PROCESSING\n\n" + DONE),
        ("anthropic", named({"type": "message_stop"})),
        ("anthropic", named(MESSAGE_START, {"type": "message_stop"})),
        ("cohere", named({"type": "message-end"})),
        ("cohere", named(COHERE_START, {"type": "message-end", "delta": {}})),
    ],
)
def test_an_end_marker_without_content_finish_reason_or_usage_is_no_success(dialect: str, body: bytes) -> None:
    came = outcome(dialect, body)
    assert came.failure is not None
    assert (came.code, came.failure.recoverable) == (ERROR, True)
    assert "without content, finish reason or usage" in came.failure.message


@pytest.mark.parametrize("events", [(STOP,), (usage_chunk(),), (HELLO,)])
def test_an_end_marker_with_any_of_them_is_one(events: tuple[Any, ...]) -> None:
    assert outcome("openai", stream(*events)).completed


@pytest.mark.parametrize(
    ("event", "code", "message"),
    [
        (data({"type": "error", "error": {"type": "overloaded_error", "message": "b"}}, "error"), OVERLOADED, "b"),
        (data({"error": {"type": "rate_limit_error", "message": "slow"}}), LIMITED, "slow"),
        (data({"type": "error", "message": "flat"}), ERROR, "flat"),
        (data({"detail": "no"}), ERROR, "no"),
        (data({"type": "invalid_request_error", "message": "prompt is too long: 9 tokens"}),
         TOO_LONG, "prompt is too long: 9 tokens"),
        (data(b"Overloaded", "error"), OVERLOADED, "Overloaded"),
        (named({"type": "message_delta", "delta": {"stop_reason": "error"}}), ERROR, "the answer ended with 'error'"),
        (named({"type": "content_block_delta", "index": 0, "error": {"message": "mixed"}}), ERROR, "mixed"),
    ],
)  # fmt: skip
def test_an_error_in_an_anthropic_stream_fails_the_answer(event: bytes, code: str, message: str) -> None:
    rest = named({"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, {"type": "message_stop"})
    came = outcome("anthropic", named(MESSAGE_START, TEXT_START, text_delta("Hi")) + event + rest)
    assert came.failure is not None
    assert (came.text, came.code, came.failure.message) == ("Hi", code, message)


@pytest.mark.parametrize(
    ("event", "code", "message"),
    [
        (data({"message": "internal error"}), ERROR, "internal error"),
        (data({"error": {"message": "boom"}}), ERROR, "boom"),
        (data({"type": "stream-error", "message": "boom"}), ERROR, "boom"),
        (named({"type": "message-end", "delta": {"finish_reason": "ERROR", "error": "boom"}}), ERROR, "boom"),
        (named({"type": "message-end", "delta": {"finish_reason": "TIMEOUT"}}), ERROR, "the answer ended with TIMEOUT"),
        (named({"type": "message-end", "delta": {"finish_reason": "error"}}), ERROR, "the answer ended with error"),
        (data(b"too many tokens: size limit exceeded by 10 tokens", "error"),
         TOO_LONG, "too many tokens: size limit exceeded by 10 tokens"),
    ],
)  # fmt: skip
def test_an_error_in_a_cohere_stream_fails_the_answer(event: bytes, code: str, message: str) -> None:
    rest = named({"type": "message-end", "delta": {"finish_reason": "COMPLETE"}})
    came = outcome("cohere", named(COHERE_START, cohere_delta("Hi")) + event + rest)
    assert came.failure is not None
    assert (came.text, came.code, came.failure.message) == ("Hi", code, message)


@pytest.mark.parametrize("dialect", ["openai", "openrouter", "anthropic", "cohere"])
@pytest.mark.parametrize("event", [{"foo": 1}, {}, {"type": "telemetry", "depth": 3}, {"object": "trace", "id": "x"}])
def test_an_unknown_event_is_a_notice(dialect: str, event: dict[str, Any]) -> None:
    endings = {
        "anthropic": named(MESSAGE_START, {"type": "message_delta", "delta": {"stop_reason": "end_turn"}})
        + named({"type": "message_stop"}),
        "cohere": named(COHERE_START, {"type": "message-end", "delta": {"finish_reason": "COMPLETE"}}),
    }
    came = outcome(dialect, data(event) * 3 + endings.get(dialect, stream(HELLO, STOP)))
    assert came.completed
    assert [notice.code for notice in came.notices] == ["upstream_unknown_event"]
    assert json.dumps(event) in came.notices[0].message


@pytest.mark.parametrize("event", [{"type": "ping"}, {"event": "heartbeat"}, {"object": "keepalive"}])
def test_a_ping_is_a_keep_alive(event: dict[str, Any]) -> None:
    came = outcome("openai", stream(HELLO, event, STOP))
    assert (came.completed, came.notices) == (True, [])


def test_chunks_without_content_are_no_notice() -> None:
    azure = {"choices": [], "prompt_filter_results": [{"prompt_index": 0}], "object": "", "id": "", "model": ""}
    filtered = {"choices": [{"index": 0, "finish_reason": None, "content_filter_results": {"hate": {}}}], "object": ""}
    minimax = {"choices": None, "base_resp": {"status_code": 0, "status_msg": ""}}
    came = outcome("openai", stream(azure, HELLO, filtered, minimax, STOP))
    assert (came.completed, came.notices, came.text) == (True, [], "Hello")


@pytest.mark.parametrize(
    "body",
    [
        stream({"error": {"message": "x" * 100_000}}),
        stream({"foo": "x" * 100_000}, HELLO),
        stream(b"x" * 100_000),
        b"x" * 100_000,
        b"{" + b"x" * 100_000,
        stream(HELLO, done=False) + b"x" * 100_000,
    ],
)
def test_messages_are_bounded(body: bytes) -> None:
    parser = parser_of("openai")
    messages = [part.message for part in [*parser.feed(body), *parser.finish()] if hasattr(part, "message")]
    assert messages
    assert all(0 < len(message) <= 500 for message in messages)
