"""Test the log of a producer for streams of servers that deviate from their dialect."""

import json
from typing import Any

import pytest

from schemas.events import AnyEvent, Completed, Failed, Notice, UsageReported
from services.kit.jetstream.broker import Broker
from services.producer.core.retry import RetryPolicy
from tests.support.foreign_streams import COHERE_START, MESSAGE_START, cohere_delta, data, named, text_delta
from tests.support.openai_answers import DONE, assert_sound, chunk, config, ending, kinds, notices
from tests.support.producer_worker import ask, ended_log, enqueue, producing, text_of
from tests.support.provider_server import Provider, Replay, providing

QUICK = RetryPolicy(max_attempts=3, base=0.01, maximum=0.2)
HELLO = chunk("Hello")


async def answered(
    broker: Broker, body: bytes, *, size: int = 4096, label: str = "text/event-stream", dialect: str = "openai"
) -> tuple[list[AnyEvent], Provider]:
    request = ask("g1", "m")
    replay = Replay.of(body, size, headers={"content-type": label})
    async with providing(replay) as provider:
        settings = config(provider.url, dialect=dialect)
        async with producing(broker, config=settings, retry=QUICK):
            await enqueue(broker, request)
            await ended_log(broker, request)
    return await assert_sound(broker, request), provider


@pytest.mark.parametrize(
    ("dialect", "body", "code", "status", "message"),
    [
        ("openai", HELLO + data({"object": "error", "message": "boom", "code": 400}) + DONE,
         "upstream_bad_request", 400, "boom"),
        ("openai", HELLO + b'error: {"code":500,"message":"boom"}\n\n' + DONE, "upstream_error", 500, "boom"),
        ("openai", HELLO + data({"choices": None, "base_resp": {"status_code": 1008, "status_msg": "no balance"}}),
         "upstream_unauthorized", None, "no balance"),
        ("openai", HELLO + data({"choices": [{"delta": {}, "finish_reason": "error"}]}) + DONE,
         "upstream_error", None, "the answer ended with 'error'"),
        ("openai", HELLO + b"no healthy upstream", "upstream_cut_off", None, "no healthy upstream"),
        ("anthropic", named(MESSAGE_START, text_delta("Hello")) + data({"detail": "boom"}),
         "upstream_error", None, "boom"),
        ("cohere", named(COHERE_START, cohere_delta("Hello")) + data({"message": "boom"}),
         "upstream_error", None, "boom"),
    ],
)  # fmt: skip
async def test_an_error_inside_an_answer_fails_it(
    broker: Broker, dialect: str, body: bytes, code: str, status: int | None, message: str
) -> None:
    events, provider = await answered(broker, body, dialect=dialect)
    failed = events[-1]
    assert isinstance(failed, Failed)
    assert (failed.code, failed.upstream_status) == (code, status)
    assert message in failed.message
    assert text_of(events) == "Hello"
    assert len(provider.asked) == 1


@pytest.mark.parametrize(
    ("body", "code", "calls"),
    [
        (data({"object": "error", "message": "boom", "code": 400}) + DONE, "upstream_bad_request", 1),
        (data({"error": {"message": "maximum context length is 8192 tokens", "code": 500}}),
         "context_length_exceeded", 1),
        (b"error: overloaded\n\n" + DONE, "upstream_overloaded", 3),
        (DONE, "upstream_error", 3),
        (b"", "upstream_cut_off", 3),
    ],
)  # fmt: skip
async def test_only_recoverable_failures_are_retried(broker: Broker, body: bytes, code: str, calls: int) -> None:
    events, provider = await answered(broker, body)
    assert isinstance(events[-1], Failed)
    assert (events[-1].code, len(provider.asked)) == (code, calls)


@pytest.mark.parametrize(
    ("body", "label"),
    [
        (HELLO + ending().removesuffix(DONE), "text/event-stream"),
        (HELLO + ending().removesuffix(b"\n\n"), "text/event-stream"),
        (HELLO + ending(), "application/json"),
        (json.dumps({"object": "chat.completion", "usage": {"prompt_tokens": 7, "completion_tokens": 5}, "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}]}).encode(),
         "application/json"),
        (data(b'{"choices":[{"index":null,"delta":{"content":"Hello"},"x":-Infinity}]}') + ending(), "text/plain"),
    ],
)  # fmt: skip
async def test_an_answer_in_another_shape_is_completed(broker: Broker, body: bytes, label: str) -> None:
    events, provider = await answered(broker, body, size=11, label=label)
    assert isinstance(events[-1], Completed)
    assert text_of(events) == "Hello"
    [usage] = [event for event in events if isinstance(event, UsageReported)]
    assert (usage.usage.input, usage.usage.output) == (7, 5)
    assert len(provider.asked) == 1


async def test_a_pair_of_surrogates_in_two_chunks_is_one_character(broker: Broker) -> None:
    halves = [b'{"choices":[{"index":0,"delta":{"content":"%s"}}]}' % half for half in (rb"a\ud83d", rb"\ude00b\ud83d")]
    events, _ = await answered(broker, b"".join(map(data, halves)) + ending())
    assert isinstance(events[-1], Completed)
    assert text_of(events) == "a😀b\ufffd"


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({"choices": [], "usage": {"prompt_tokens": 7}, "created": []}, "upstream_malformed_fields"),
        ({"progress": 0.5}, "upstream_unknown_event"),
    ],
)
async def test_skipped_content_is_one_notice_per_generation(broker: Broker, event: Any, code: str) -> None:
    """The notice ahead of the first token does not count as one."""
    events, _ = await answered(broker, data(event) * 3 + HELLO + data(event) * 3 + ending(), size=20)
    assert kinds(events) == ["started", f"notice {code}", "delta", "usage", "completed"]
    [notice] = notices(events, code)
    assert isinstance(notice, Notice)
    assert notice.provider == "p0"
