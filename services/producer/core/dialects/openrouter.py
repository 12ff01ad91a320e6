"""The OpenRouter dialect: chat completions with comments, errors in chunks, an id in a header, cost, and look-ups."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

import msgspec

from schemas.usage import Usage
from services.producer.core.dialects.openai import OpenAI, OpenAIParser
from services.producer.core.dialects.usage import UsageRules, read_usage
from services.producer.core.dialects.wire import NO_HEADERS, Parser

__all__ = ["OpenRouter", "late_usage"]

_RULES: Final = UsageRules(currency="USD")
"""Credits are US dollars."""
_exact: Final = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal)


class OpenRouter(OpenAI):
    """OpenRouter's chat completions. Look-ups need the identifier in ``X-Generation-Id``."""

    def parser(self, headers: Mapping[str, str] = NO_HEADERS) -> Parser:
        """Return a fresh parser, which also reads the cost."""
        return OpenAIParser(upstream_id=headers.get("x-generation-id"), rules=_RULES)


def late_usage(body: bytes) -> Usage | None:
    """Return the usage in a response of ``GET /generation?id=``: native counts, else normalised ones.

    ``None`` while there is no usage, or all counts are zero.
    """
    try:
        reported = _exact.decode(body)
    except (ValueError, RecursionError):
        return None
    usage = read_usage(reported.get("data"), _RULES).usage
    return None if usage is None or usage.blank else usage
