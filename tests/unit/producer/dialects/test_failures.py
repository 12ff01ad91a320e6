"""Test the classification of error responses."""

import pytest

from services.producer.core.dialects import dialect_of
from services.producer.core.dialects.failures import failure_in_stream, retry_after

NOW = 1_764_870_000.0


def openai_error(message: str, type_: str = "", code: str = "null") -> bytes:
    return b'{"error": {"message": "%s", "type": "%s", "code": %s}}' % (message.encode(), type_.encode(), code.encode())


@pytest.mark.parametrize(
    ("status", "body", "code", "recoverable"),
    [
        (401, openai_error("Incorrect API key provided", "invalid_request_error", '"invalid_api_key"'),
         "upstream_unauthorized", False),
        (429, openai_error("Rate limit reached", "requests", '"rate_limit_exceeded"'), "upstream_rate_limited", True),
        (429, openai_error("You exceeded your quota", "insufficient_quota", '"insufficient_quota"'),
         "upstream_rate_limited", False),
        (404, openai_error("no such model", "invalid_request_error", '"model_not_found"'), "upstream_not_found", False),
        (400, openai_error("too long", "invalid_request_error", '"context_length_exceeded"'),
         "context_length_exceeded", False),
        (400, b'{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long: 9 tokens"}}',
         "context_length_exceeded", False),
        (400, openai_error("policy", "", '"content_policy_violation"'), "content_filtered", False),
        (529, b'{"type":"error","error":{"type":"overloaded_error","message":"busy"}}', "upstream_overloaded", True),
        (500, b"<html>oops</html>", "upstream_error", True),
        (503, b"", "upstream_overloaded", True),
        (400, b'{"message": "invalid request: tools"}', "upstream_bad_request", False),
        (422, b"[]", "upstream_bad_request", False),
        (403, b'{"error":{"code":403,"message":"flagged","metadata":{"flagged_input":"x","reasons":["y"]}}}',
         "content_filtered", False),
        (402, b'{"error":{"code":402,"message":"Insufficient credits"}}', "upstream_unauthorized", False),
        (302, b"", "upstream_malformed", False),
        (200, b'{"error": {"message": "busy", "code": 503}}', "upstream_overloaded", True),
        (200, b"<html>login</html>", "upstream_malformed", False),
        (500, b"\xff\xfe" * 10, "upstream_error", True),
        (500, b"[" * 100_000, "upstream_error", True),
    ],
)  # fmt: skip
def test_a_refusal_has_a_stable_code(status: int, body: bytes, code: str, recoverable: bool) -> None:
    failure = dialect_of("openai").refusal(status, {"content-type": "text/html"}, body, NOW)
    assert (failure.code, failure.recoverable, failure.upstream_status) == (code, recoverable, status)
    assert 0 < len(failure.message) <= 500


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Thu, 04 Dec 2025 17:40:30 GMT"}, 30.0),
        ({"retry-after": "Thu, 04 Dec 2025 17:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "9" * 40}, None),
    ],
)
def test_the_requested_pause_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, NOW) == seconds


@pytest.mark.parametrize("error", ["busy", 17, [], {"message": None}, {"code": None, "metadata": "x"}])
def test_an_error_of_any_shape_in_a_stream_is_a_failure(error: object) -> None:
    failure = failure_in_stream(error)
    assert failure.code == "upstream_error"
    assert failure.message
