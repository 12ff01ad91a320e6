"""OpenRouter: chat completions with comments, errors inside chunks, a name in a header, and cost."""

from collections.abc import Mapping

from services.producer.core.dialects.openai import OpenAI, OpenAIParser
from services.producer.core.dialects.wire import NO_HEADERS, Parser

__all__ = ["OpenRouter"]


class OpenRouter(OpenAI):
    """OpenRouter's chat completions. Credits are US dollars; look-ups want the name in ``X-Generation-Id``."""

    def parser(self, headers: Mapping[str, str] = NO_HEADERS) -> Parser:
        """Return a fresh parser, which also reads the cost."""
        return OpenAIParser(upstream_id=headers.get("x-generation-id"), currency="USD")
