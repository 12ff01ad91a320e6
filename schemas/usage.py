"""Token usage, normalised over providers.

The classes are disjoint from each other in meaning but nested in counting, as OpenAI reports them: ``input`` is *all*
input tokens and includes ``cached_input`` and ``cache_write``; ``output`` is *all* output tokens and includes
``reasoning``. Dialects that exclude cached tokens from their input number (Anthropic) are converted when parsed.
"""

from typing import Annotated, Any

import msgspec

__all__ = ["MAX_NUMBER", "Counted", "Epoch", "Number", "Usage"]

MAX_NUMBER = 2**53 - 1
"""The largest whole number that JSON carries exactly to every language; a database column holds it too."""

Number = Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)]
"""A count or an index. Only reading checks the bounds."""

Epoch = Annotated[int, msgspec.Meta(ge=1, le=MAX_NUMBER)]
"""Which attempt of a producer: 1, 2 …"""


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a provider says that a generation used, in tokens.

    ``cost`` is an exact decimal number in ``currency``, as text, where the provider states one (OpenRouter).
    ``billed_input`` and ``billed_output`` stand where a provider bills other numbers than it processed (Cohere).
    ``raw`` keeps the provider's own object unchanged.
    """

    input: Number = 0
    output: Number = 0
    cached_input: Number = 0
    cache_write: Number = 0
    reasoning: Number = 0
    billed_input: Number | None = None
    billed_output: Number | None = None
    cost: str | None = None
    currency: str | None = None
    raw: dict[str, Any] | None = None


class Counted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Tailrace's own count of a generation, in tokens.

    ``exact`` is true where ``encoding`` is the model's own; otherwise the number is an estimate made with ``encoding``.
    """

    input: Number = 0
    output: Number = 0
    exact: bool = False
    encoding: str = ""
