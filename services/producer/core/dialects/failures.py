"""Map providers' errors to failures with our own stable codes and messages of bounded length."""

import email.utils
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from services.producer.core.dialects.leniency import plain
from services.producer.core.dialects.meanings import Meaning, meaning_of, meaning_of_text
from services.producer.core.dialects.reported import Reported, described, reported
from services.producer.core.parts import UpstreamFailure

__all__ = [
    "MESSAGE_LIMIT",
    "cut_off",
    "empty",
    "failure_in_stream",
    "malformed",
    "quoted",
    "refusal_of",
    "retry_after",
]

MESSAGE_LIMIT: Final = 500
_QUOTED: Final = 300
_NO_MARKER: Final = "the provider's stream ended without its end marker"
_NO_DETAILS: Final = "the provider reported an error without details"
_EMPTY: Final = "the provider ended the answer without content, finish reason or usage"


def refusal_of(status: int, headers: Mapping[str, str], body: bytes, now: float) -> UpstreamFailure:
    """Return the failure of a response with an error status or without an event stream."""
    error, stated = _error_in(body)
    if status < 400 and not stated:
        kind = headers.get("content-type", "no content type")
        return UpstreamFailure(
            code="upstream_malformed",
            message=_bounded(f"answered {status} with {kind} instead of an event stream: {error.message}"),
            upstream_status=status,
        )
    code, recoverable = _meaning(error, status if status >= 400 else error.status)
    return UpstreamFailure(
        code=code,
        message=_bounded(error.message) or f"answered with status {status}",
        upstream_status=status,
        recoverable=recoverable,
        retry_after=retry_after(headers, now),
    )


def failure_in_stream(error: Any) -> UpstreamFailure:
    """Return the failure of an error inside a stream. ``error``: its event, or only an error object or text."""
    reported = described(error)
    code, recoverable = _meaning(reported, reported.status)
    return UpstreamFailure(
        code=code,
        message=_bounded(reported.message) or _bounded(_error_text(error)) or _NO_DETAILS,
        upstream_status=reported.status,
        recoverable=recoverable,
    )


def malformed(reason: object, data: bytes = b"") -> UpstreamFailure:
    """Return the failure of a stream that violates its dialect. ``data``: the unreadable input.

    Text that is not JSON is matched with known messages, such as a proxy's "rate limit exceeded".
    """
    if data and data.lstrip()[:1] not in b'{["' and (meaning := meaning_of_text(data.decode(errors="replace"))):
        return _from_text(meaning, data)
    shown = f" in {quoted(data)}" if data else ""
    return UpstreamFailure(code="upstream_malformed", message=_bounded(f"the stream is malformed: {reason}{shown}"))


def cut_off(rest: bytes, broken: str = "", instead: bool = False) -> UpstreamFailure:
    """Return the failure of a stream that ended before its answer did.

    ``rest``: unreadable input, or input after its last event. ``broken``: why the connection broke, empty if the body
    ended properly. ``instead``: ``rest`` is the whole body.
    """
    if rest and instead:
        if meaning := meaning_of_text(rest.decode(errors="replace")):
            return _from_text(meaning, rest)
        return UpstreamFailure("upstream_malformed", _bounded(f"the body is not an answer: {quoted(rest)}"))
    text = f"the connection broke: {broken}" if broken else _NO_MARKER
    return UpstreamFailure("upstream_cut_off", _with_rest(text, rest), recoverable=True)


def empty(rest: bytes) -> UpstreamFailure:
    """Return the failure of an answer that ended without content. ``rest``: the input outside of events."""
    meaning = meaning_of_text(rest.decode(errors="replace")) if rest else None
    if meaning is not None:
        return _from_text(meaning, rest)
    return UpstreamFailure("upstream_error", _with_rest(_EMPTY, rest), recoverable=True)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the pause that the provider requests in seconds (RFC 9110 section 10.2.3, or ``retry-after-ms``)."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
            return float(value) * scale
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - now)
    except (KeyError, ValueError, OverflowError):
        return None


def quoted(data: bytes) -> str:
    """Return the beginning of a provider's input, as a literal on one line."""
    text = " ".join(data[: _QUOTED * 4].decode(errors="replace").split())
    return repr(text if len(text) <= _QUOTED else text[: _QUOTED - 1] + "…")


def _from_text(meaning: Meaning, data: bytes) -> UpstreamFailure:
    code, recoverable = meaning
    return UpstreamFailure(code, _bounded(data[: MESSAGE_LIMIT * 4].decode(errors="replace")), recoverable=recoverable)


def _with_rest(text: str, rest: bytes) -> str:
    return _bounded(f"{text}: {quoted(rest)}" if rest else text)


def _meaning(error: Reported, status: int | None) -> Meaning:
    return ("content_filtered", False) if error.moderated else meaning_of(error.words, error.message, status)


def _error_in(body: bytes) -> tuple[Reported, bool]:
    """Return the error in a body, and whether the body marks it as one."""
    try:
        decoded = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return Reported(message=body.decode(errors="replace").strip()), False
    if isinstance(decoded, list):
        decoded = next((item for item in decoded if isinstance(item, dict)), None)
    if not isinstance(decoded, dict):
        return Reported(), False
    stated = reported(decoded)
    return (stated, True) if stated is not None else (described(decoded), False)


def _error_text(error: Any) -> str:
    """Return the text of an error object without a message: the object itself."""
    if not error or not isinstance(error, dict | list):
        return ""
    try:
        return msgspec.json.encode(plain(error)).decode()
    except RecursionError:
        return ""


def _bounded(text: str) -> str:
    text = plain(" ".join(text[: MESSAGE_LIMIT * 4].split()))
    return text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 1] + "…"
