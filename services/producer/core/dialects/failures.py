"""What providers' error statuses and words mean, as our own stable codes."""

import email.utils
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from services.producer.core.parts import UpstreamFailure

__all__ = ["MESSAGE_LIMIT", "failure_in_stream", "malformed", "refusal_of", "retry_after"]

MESSAGE_LIMIT: Final = 500
_Meaning = tuple[str, bool]

# status -> (code, whether asking again may help)
_STATUSES: Final[dict[int, _Meaning]] = {
    401: ("upstream_unauthorized", False),
    402: ("upstream_unauthorized", False),
    403: ("upstream_unauthorized", False),
    404: ("upstream_not_found", False),
    408: ("upstream_error", True),
    409: ("upstream_error", True),
    425: ("upstream_error", True),
    429: ("upstream_rate_limited", True),
    503: ("upstream_overloaded", True),
    529: ("upstream_overloaded", True),
}
# a provider's own word (error.type or error.code) -> the same
_WORDS: Final[dict[str, _Meaning]] = {
    "api_error": ("upstream_error", True),
    "authentication_error": ("upstream_unauthorized", False),
    "billing_error": ("upstream_unauthorized", False),
    "content_filter": ("content_filtered", False),
    "content_policy_violation": ("content_filtered", False),
    "context_length_exceeded": ("context_length_exceeded", False),
    "insufficient_quota": ("upstream_rate_limited", False),
    "invalid_api_key": ("upstream_unauthorized", False),
    "invalid_request_error": ("upstream_bad_request", False),
    "model_not_found": ("upstream_not_found", False),
    "not_found_error": ("upstream_not_found", False),
    "overloaded_error": ("upstream_overloaded", True),
    "permission_error": ("upstream_unauthorized", False),
    "rate_limit_error": ("upstream_rate_limited", True),
    "rate_limit_exceeded": ("upstream_rate_limited", True),
    "request_too_large": ("upstream_bad_request", False),
    "server_error": ("upstream_error", True),
    "timeout_error": ("upstream_error", True),
}
_TOO_LONG: Final = re.compile(
    r"(?i)maximum context length|context[ _](length|window)|prompt is too long|too many (input )?tokens"
)


class _Error(msgspec.Struct):
    message: str = ""
    words: tuple[str, ...] = ()
    status: int | None = None
    stated: bool = False
    moderated: bool = False


def refusal_of(status: int, headers: Mapping[str, str], body: bytes, now: float) -> UpstreamFailure:
    """Return what an answer with an error status, or one that is no event stream, means."""
    error = _error_in(body)
    if status < 400 and not error.stated:
        kind = headers.get("content-type", "no content type")
        return UpstreamFailure(
            code="upstream_malformed",
            message=_bounded(f"answered {status} with {kind} instead of an event stream: {error.message}"),
            upstream_status=status,
        )
    code, recoverable = _meaning(error, status)
    return UpstreamFailure(
        code=code,
        message=_bounded(error.message or f"answered with status {status}"),
        upstream_status=status,
        recoverable=recoverable,
        retry_after=retry_after(headers, now),
    )


def failure_in_stream(error: Any) -> UpstreamFailure:
    """Return what an error object (or text) inside a stream means."""
    described = _describe(error)
    code, recoverable = _meaning(described, None)
    return UpstreamFailure(
        code=code,
        message=_bounded(described.message or "the provider reported an error without saying which"),
        upstream_status=described.status,
        recoverable=recoverable,
    )


def malformed(reason: object, data: bytes = b"") -> UpstreamFailure:
    """Return the failure of a stream that does not follow its dialect. ``data``: what was not understood."""
    shown = f" in {data[:80].decode(errors='replace')!r}" if data else ""
    return UpstreamFailure(code="upstream_malformed", message=_bounded(f"the stream is malformed: {reason}{shown}"))


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return for how many seconds the provider asks to pause (RFC 9110 section 10.2.3, or ``retry-after-ms``)."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
            return float(value) * scale
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - now)
    except (KeyError, ValueError, OverflowError):
        return None


def _meaning(error: _Error, status: int | None) -> _Meaning:
    if _TOO_LONG.search(error.message) and status in (None, 400, 413, 422):
        return "context_length_exceeded", False
    if error.moderated:
        return "content_filtered", False
    for word in error.words:
        if word in _WORDS:
            return _WORDS[word]
    status = error.status if status is None or status < 400 else status
    if status is None:
        return "upstream_error", True
    if status in _STATUSES:
        return _STATUSES[status]
    return ("upstream_error", True) if status >= 500 else ("upstream_bad_request", False)


def _error_in(body: bytes) -> _Error:
    try:
        decoded = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return _Error(message=body.decode(errors="replace").strip())
    if isinstance(decoded, list) and decoded:
        decoded = decoded[0]
    if isinstance(decoded, dict) and decoded.get("error"):
        return _describe(decoded["error"])
    if isinstance(decoded, dict):
        return _Error(message=str(decoded.get("message") or decoded.get("detail") or ""))
    return _Error()


def _describe(error: Any) -> _Error:
    if not isinstance(error, dict):
        return _Error(message=str(error), stated=True)
    metadata = error.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    message = str(error.get("message") or "")
    if isinstance(raw := metadata.get("raw"), str) and raw not in message:
        message = f"{message}: {raw}"
    named = (error.get("code"), error.get("type"), metadata.get("error_type"))
    return _Error(
        message=message,
        words=tuple(str(word) for word in named if word),
        status=next((int(str(word)) for word in named if re.fullmatch(r"[1-5]\d\d", str(word))), None),
        stated=True,
        moderated="flagged_input" in metadata,
    )


def _bounded(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 1] + "…"
