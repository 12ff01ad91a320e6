"""Dialects of providers: build requests and parse streams. A dialect handles bytes, not sockets."""

from typing import Final, Literal, get_args

from services.producer.core.dialects.anthropic import Anthropic
from services.producer.core.dialects.cohere import Cohere
from services.producer.core.dialects.openai import OpenAI
from services.producer.core.dialects.openrouter import OpenRouter
from services.producer.core.dialects.usage import rules_of
from services.producer.core.dialects.wire import Dialect, HttpCall, Parser, UntranslatableCall

__all__ = ["DIALECTS", "Dialect", "DialectName", "HttpCall", "Parser", "UntranslatableCall", "dialect_of"]

DialectName = Literal["openai", "openrouter", "anthropic", "cohere"]
DIALECTS: Final[tuple[str, ...]] = get_args(DialectName)


def dialect_of(name: DialectName, include_usage: bool = True, base_url: str = "") -> Dialect:
    """Return the dialect of this name. ``include_usage``: off for servers that reject ``stream_options``.

    ``base_url``: the provider's address, which determines its `UsageRules`.
    """
    match name:
        case "openai":
            return OpenAI(include_usage, rules_of(base_url))
        case "openrouter":
            return OpenRouter(include_usage)
        case "anthropic":
            return Anthropic()
        case "cohere":
            return Cohere()
