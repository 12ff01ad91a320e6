"""Find the error in a provider's event or body of any shape."""

import re
from typing import Any, Final

import msgspec

__all__ = ["Reported", "described", "reported"]

_DEPTH: Final = 4
_MESSAGES: Final = (
    "message",
    "msg",
    "status_msg",
    "error_msg",
    "errorMessage",
    "error_message",
    "errmsg",
    "detail",
    "description",
    "error_description",
    "faultstring",
    "reason",
    "title",
    "error",
    "Message",
)
_WORDS: Final = ("code", "type", "error_type", "error_code", "errorCode", "status", "reason", "__type", "name")
_STATUSES: Final = ("status_code", "statusCode", "http_status", "http_code", "status", "code", "error_code")
_INNER: Final = ("error", "errors", "base_resp", "fault", "exception", "err", "detail", "header", "response")
# Fields that mark an unknown event as an error.
_SIGNS: Final = (
    "errors",
    "fault",
    "exception",
    "err",
    "error_code",
    "errorCode",
    "error_msg",
    "error_message",
    "errorMessage",
    "errmsg",
    "__type",
)
_TOLD: Final = frozenset(
    (*_SIGNS, *_STATUSES, "error", "base_resp", "object", "type", "event", "state", "detail", "success", "ok")
) | {"message", "msg", "header"}
_FAILED: Final = re.compile(r"(?i)error|exception|fail|abort")
_FINE: Final = ("", "0", "200", "ok", "success", "none", "null")


class Reported(msgspec.Struct, frozen=True):
    """An error as the provider reports it. ``words``: its codes and types, the innermost first."""

    message: str = ""
    words: tuple[str, ...] = ()
    status: int | None = None
    moderated: bool = False


def reported(event: dict[str, Any], known: bool = False) -> Reported | None:
    """Return the error in an event, or ``None``.

    ``known``: the event has fields of an answer, so only an explicit error in it counts.
    """
    if _TOLD.isdisjoint(event):
        return None
    if _explicit(event, known) or (not known and _implied(event)):
        return described(event)
    return None


def described(error: Any, depth: int = 0) -> Reported:
    """Return the error in a value of any shape; nested objects have priority."""
    if isinstance(error, list):
        error = next((item for item in error if item), "")
    if not isinstance(error, dict):
        return Reported(message="" if error is None else str(error))
    inner = Reported()
    if depth < _DEPTH:
        found = next((error[name] for name in _INNER if isinstance(error.get(name), dict | list) and error[name]), None)
        inner = _validation(found) or described(found, depth + 1) if found is not None else inner
    metadata = error.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    own = next((value for name in _MESSAGES if (value := _text(error.get(name)))), "")
    message = _text(error.get("error")) or inner.message or own
    if isinstance(raw := metadata.get("raw"), str) and raw not in message:
        message = f"{message}: {raw}"
    named = [*(error.get(name) for name in _WORDS), metadata.get("error_type")]
    words = [word for value in named if (word := _word(value))]
    if "status_msg" in error and (word := _word(error.get("status_code"))):
        words.append(f"base_resp:{word}")
    return Reported(
        message=message,
        words=(*inner.words, *words),
        status=inner.status or next((status for name in _STATUSES if (status := _status(error.get(name)))), None),
        moderated=inner.moderated or "flagged_input" in metadata,
    )


def _explicit(event: dict[str, Any], known: bool) -> bool:
    error = event.get("error")
    if error if known else "error" in event and error not in (None, False, "", 0):
        return True
    base = event.get("base_resp")
    if isinstance(base, dict) and _word(base.get("status_code")).lower() not in _FINE:
        return True
    return any(isinstance(value := event.get(name), str) and "error" in value.lower() for name in ("object", "type"))


def _implied(event: dict[str, Any]) -> bool:
    if any(event.get(name) for name in _SIGNS) or (event.get("detail") and "type" not in event):
        return True
    if event.get("success") is False or event.get("ok") is False:
        return True
    kinds = [event.get(name) for name in ("object", "type", "event", "status", "state")]
    if any(isinstance(kind, str) and _FAILED.search(kind) for kind in kinds):
        return True
    if any(_status(event.get(name)) for name in _STATUSES):
        return True
    header = event.get("header")
    speaks = header if isinstance(header, dict) else event
    text = _text(speaks.get("message")) or _text(speaks.get("msg"))
    if text and _word(speaks.get("code")).lower() not in _FINE:
        return True
    return bool(text) and not any(kind for kind in kinds)


def _validation(details: Any) -> Reported | None:
    """Return FastAPI's list of request errors as one error."""
    if not isinstance(details, list):
        return None
    reported = [item for item in details if isinstance(item, dict) and isinstance(item.get("msg"), str)]
    if not reported:
        return None
    lines = [_validated(item) for item in reported[:5]]
    return Reported(message="; ".join(lines), words=("validation_error",))


def _validated(item: dict[str, Any]) -> str:
    where = item.get("loc")
    return f"{'.'.join(map(str, where))}: {item['msg']}" if isinstance(where, list) else str(item["msg"])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _word(value: Any) -> str:
    return str(value)[:100] if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _status(value: Any) -> int | None:
    word = _word(value)
    return int(word) if len(word) == 3 and word[0] in "45" and word.isascii() and word.isdigit() else None
