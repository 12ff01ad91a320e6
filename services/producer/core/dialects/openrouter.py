"""OpenRouter: chat completions with comments, errors inside chunks, a name in a header, cost, and later look-ups."""

from collections.abc import Mapping
from decimal import Decimal

import msgspec

from schemas.usage import Usage
from services.producer.core.dialects.openai import OpenAI, OpenAIParser, exact_cost
from services.producer.core.dialects.wire import NO_HEADERS, Parser

__all__ = ["OpenRouter", "late_usage"]


class _Generation(msgspec.Struct):
    native_tokens_prompt: int | None = None
    native_tokens_completion: int | None = None
    native_tokens_reasoning: int | None = None
    native_tokens_cached: int | None = None
    tokens_prompt: int | None = None
    tokens_completion: int | None = None
    total_cost: Decimal | None = None


class _Answer(msgspec.Struct):
    data: _Generation


class OpenRouter(OpenAI):
    """OpenRouter's chat completions. Credits are US dollars; look-ups want the name in ``X-Generation-Id``."""

    def parser(self, headers: Mapping[str, str] = NO_HEADERS) -> Parser:
        """Return a fresh parser, which also reads the cost."""
        return OpenAIParser(upstream_id=headers.get("x-generation-id"), currency="USD")


def late_usage(body: bytes) -> Usage | None:
    """Return the usage in an answer of ``GET /generation?id=``: native counts, else normalised ones."""
    try:
        told = msgspec.json.decode(body, type=_Answer).data
        raw = msgspec.json.decode(body, type=dict[str, dict[str, object]])["data"]
    except (msgspec.DecodeError, KeyError):
        return None
    cost = exact_cost(told.total_cost)
    return Usage(
        input=told.native_tokens_prompt or told.tokens_prompt or 0,
        output=told.native_tokens_completion or told.tokens_completion or 0,
        cached_input=told.native_tokens_cached or 0,
        reasoning=told.native_tokens_reasoning or 0,
        cost=cost,
        currency="USD" if cost is not None else None,
        raw=raw,
    )
