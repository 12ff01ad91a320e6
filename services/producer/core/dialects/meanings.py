"""Map the words, texts and statuses of providers' errors to our own stable codes."""

import re
from collections.abc import Iterable
from typing import Final

__all__ = ["Meaning", "meaning_of", "meaning_of_text"]

Meaning = tuple[str, bool]
"""The code, and whether a retry of the same request may succeed."""

_TOO_LONG: Final = ("context_length_exceeded", False)
_FILTERED: Final = ("content_filtered", False)
_LIMITED: Final = ("upstream_rate_limited", True)
_SPENT: Final = ("upstream_rate_limited", False)
_UNPAID: Final = ("upstream_unauthorized", False)
_UNAUTHORIZED: Final = ("upstream_unauthorized", False)
_NOT_FOUND: Final = ("upstream_not_found", False)
_OVERLOADED: Final = ("upstream_overloaded", True)
_BROKEN: Final = ("upstream_error", True)
_REFUSED: Final = ("upstream_bad_request", False)

_STATUSES: Final[dict[int, Meaning]] = {
    401: _UNAUTHORIZED,
    402: _UNPAID,
    403: _UNAUTHORIZED,
    404: _NOT_FOUND,
    408: _BROKEN,
    409: _BROKEN,
    425: _BROKEN,
    429: _LIMITED,
    503: _OVERLOADED,
    529: _OVERLOADED,
}
# Words that name the error exactly (``error.code``, ``error.type`` and their like), in lower case.
_EXACT: Final[tuple[tuple[Meaning, tuple[str, ...]], ...]] = (
    (
        _TOO_LONG,
        (
            "context_length_exceeded",
            "contextwindowexceedederror",  # LiteLLM
            "exceed_context_size_error",  # llama.cpp
            "model_context_window_exceeded",
            "prompt_too_long",
            "tokens_too_long",
            "1261",  # GLM
        ),
    ),
    (
        _FILTERED,
        (
            "content_filter",
            "content_policy_violation",
            "contentpolicyviolationerror",
            "data_inspection_failed",  # Qwen
            "datainspectionfailed",
            "responsibleaipolicyviolation",  # Azure
            "sensitive_check_error",
            "1301",
            "base_resp:1026",  # MiniMax: sensitive input, sensitive output
            "base_resp:1027",
        ),
    ),
    (
        _LIMITED,
        (
            "limit_requests",
            "rate_limit",
            "rate_limit_error",
            "rate_limit_exceeded",
            "rate_limit_reached_error",  # Moonshot
            "rate_limited",
            "ratelimiterror",
            "resource_exhausted",  # Google
            "throttling",
            "throttling.ratequota",
            "throttlingexception",  # Bedrock
            "too_many_requests",
            "toomanyrequests",
            "1302",
            "1303",
            "base_resp:1002",
            "base_resp:1039",
            "base_resp:1041",
            "base_resp:2045",
        ),
    ),
    (
        _SPENT,
        (
            "billing_hard_limit_reached",
            "exceeded_current_quota_error",
            "insufficient_quota",
            "quota_exceeded",
            "1308",
            "base_resp:2056",
        ),
    ),
    (
        _UNPAID,
        (
            "arrearage",
            "billing_error",
            "billing_not_active",
            "insufficient_balance",
            "insufficient_credits",
            "payment_required",
            "1113",
            "base_resp:1008",
        ),
    ),
    (
        _UNAUTHORIZED,
        (
            "access_denied",
            "account_deactivated",
            "authentication_error",
            "authenticationerror",
            "forbidden",
            "incorrect_api_key_error",
            "invalid_api_key",
            "invalid_authentication_error",
            "invalidapikey",
            "permission_denied",
            "permission_denied_error",
            "permission_error",
            "unauthenticated",
            "unauthorized",
            "base_resp:1004",
            "base_resp:2049",
        ),
    ),
    (
        _NOT_FOUND,
        (
            "deploymentnotfound",
            "invalid_model",  # Mistral
            "model_decommissioned",  # Groq
            "model_not_found",
            "modelnotfound",
            "not_found",
            "not_found_error",
            "notfounderror",  # vLLM
            "resource_not_found_error",
            "1211",
        ),
    ),
    (
        _OVERLOADED,
        (
            "capacity_exceeded",
            "engine_overloaded",
            "engine_overloaded_error",
            "insufficient_system_resource",  # DeepSeek, as a finish reason
            "model_overloaded",
            "overloaded",  # TGI
            "overloaded_error",
            "service_unavailable",
            "serviceunavailable",
            "serviceunavailableexception",
            "unavailable",
            "unavailable_error",
            "1305",
        ),
    ),
    (_REFUSED, ("request_too_large",)),
)
_WORDS: Final[dict[str, Meaning]] = {word: meaning for meaning, words in _EXACT for word in words}
# Words that some servers use for every error: a status is more specific.
_LOOSE_WORDS: Final[dict[str, Meaning]] = dict.fromkeys(
    (
        "bad_request",
        "badrequesterror",
        "invalid_argument",
        "invalid_request_error",
        "validation",
        "validation_error",
        "base_resp:2013",
    ),
    _REFUSED,
) | dict.fromkeys(
    (
        "api_error",
        "deadline_exceeded",
        "generation",
        "incomplete_generation",
        "internal",
        "internal_error",
        "internal_server_error",
        "internalservererror",
        "network_error",
        "server_error",
        "timeout",
        "timeout_error",
    ),
    _BROKEN,
)

_LENGTH_TEXT: Final = re.compile(
    r"(?i)context[ _-]?(length|window|size|limit)"
    r"|maximum (context|prompt|sequence|input|model) length|max(imum)?[ _]model[ _]len"
    r"|(prompt|input) (is |tokens )?too long|too long: \d+ tokens"
    r"|too many (input |prompt )?tokens|maximum number of (input |prompt )?tokens"
    r"|(token|input|prompt)[ _](count|limit)( of \d+)?:? exceed|exceed\w* (the )?(model )?token limit"
    r"|longer than the (maximum )?(model|context)|prompt exceeds max length|range of input length"
    r"|`?inputs`?( tokens \+ `?max_new_tokens`?)? must (be <=|have less than)"
    r"|reduce the length of the (messages|prompt|input|chat)|prompt contains \d+ tokens|context the overflows"
)
_LIMIT_TEXT: Final = re.compile(
    r"(?i)rate[ _-]?limit|too many (concurrent )?requests|(requests|tokens) per (second|minute|hour|day)|throttl"
)
_UNPAID_TEXT: Final = re.compile(
    r"(?i)insufficient (account )?(balance|credits?|funds)|balance (is )?(not enough|too low|insufficient)"
    r"|out of credits|payment required|in arrears|not enough credits"
)
_SPENT_TEXT: Final = re.compile(
    r"(?i)insufficient quota|quota (is |has been )?(exhausted|exceeded)|exceeded your current quota"
)
_KEY_TEXT: Final = re.compile(
    r"(?i)(invalid|incorrect|missing|expired|no) (api|access|auth\w*)[ _-]?(key|token)"
    r"|api[ _-]?key (is )?(not valid|invalid|missing|expired)|unauthorized|authentication failed"
)
_MODEL_TEXT: Final = re.compile(
    r"(?i)\bmodel\b.{0,120}?\b((does )?not exist|not found|is not available|has been (deprecated|decommissioned))"
    r"|(unknown|no such|invalid) model\b|no models? loaded"
)
_FILTER_TEXT: Final = re.compile(
    r"(?i)content[ _]?(management |usage )?(policy|policies|filter)|safety system|moderation|flagged"
    r"|sensitive (content|words?|information)|inappropriate content|data inspection"
)
_BUSY_TEXT: Final = re.compile(
    r"(?i)overload|(at|over|no) (full )?capacity|(server|engine|service|model) is (too )?busy|loading model"
    r"|currently loading|temporarily unavailable|service unavailable|no healthy upstream"
)
_TEXTS: Final = (
    (_UNPAID_TEXT, _UNPAID),
    (_SPENT_TEXT, _SPENT),
    (_LIMIT_TEXT, _LIMITED),
    (_KEY_TEXT, _UNAUTHORIZED),
    (_MODEL_TEXT, _NOT_FOUND),
    (_FILTER_TEXT, _FILTERED),
    (_BUSY_TEXT, _OVERLOADED),
)
_TEXT_LIMIT: Final = 4_000


def meaning_of(words: Iterable[str], text: str, status: int | None) -> Meaning:
    """Return the code of an error: an exact word first, then its text, then the status, then a loose word.

    ``status``: of the HTTP response or in the error itself, if any. A text never overrides a status that is exact
    itself, except texts about a too long prompt or a spent balance.
    """
    words = [word.lower() for word in words]
    for word in words:
        if word in _WORDS:
            return _WORDS[word]
    text = text[:_TEXT_LIMIT]
    if status not in _STATUSES and _LENGTH_TEXT.search(text):
        return _TOO_LONG
    if status == 429 and _UNPAID_TEXT.search(text):
        return _UNPAID
    if status == 403 and _FILTER_TEXT.search(text):
        return _FILTERED
    if (status is None or status in (400, 413, 422, 500)) and (meaning := meaning_of_text(text)):
        return meaning
    if status in _STATUSES:
        return _STATUSES[status]
    if status is not None:
        return _BROKEN if status >= 500 else _REFUSED
    return next((_LOOSE_WORDS[word] for word in words if word in _LOOSE_WORDS), _BROKEN)


def meaning_of_text(text: str) -> Meaning | None:
    """Return the code of a text without status and words, or ``None`` for an unknown text."""
    text = text[:_TEXT_LIMIT]
    if _LENGTH_TEXT.search(text):
        return _TOO_LONG
    return next((meaning for pattern, meaning in _TEXTS if pattern.search(text)), None)
