"""What a provider's stream says, in terms of no provider: the output of every dialect's parser."""

import msgspec

from schemas.events import Binary, ToolCall
from schemas.usage import Usage

__all__ = [
    "Alive",
    "BinaryPart",
    "End",
    "Finish",
    "Identity",
    "Part",
    "Reasoning",
    "Text",
    "ToolCallPart",
    "UpstreamFailure",
    "UsageBegun",
    "UsageLeftOut",
    "UsagePart",
]


class Text(msgspec.Struct, frozen=True):
    """Answer text. ``at``: the provider's time stamp of the chunk in seconds since 1970, where it gives one."""

    text: str
    choice: int = 0
    at: float | None = None


class Reasoning(msgspec.Struct, frozen=True):
    """Text of the model's reasoning."""

    text: str
    choice: int = 0
    at: float | None = None


class ToolCallPart(msgspec.Struct, frozen=True):
    """A fragment of a tool call."""

    tool_call: ToolCall
    choice: int = 0
    at: float | None = None


class BinaryPart(msgspec.Struct, frozen=True):
    """Bytes that the model emitted."""

    binary: Binary
    choice: int = 0
    at: float | None = None


class Finish(msgspec.Struct, frozen=True):
    """One choice ended. ``reason``: ``stop``, ``length``, ``tool_calls``, ``content_filter`` or the provider's word."""

    reason: str
    choice: int = 0


class UsagePart(msgspec.Struct, frozen=True):
    """Usage as the provider reports it so far; of several reports of one answer the larger counts hold."""

    usage: Usage


class UsageLeftOut(msgspec.Struct, frozen=True):
    """The provider sent a report of usage that could not be read. ``reasons``: out of `schemas.usage.USAGE_REASONS`."""

    reasons: tuple[str, ...]


class UsageBegun(msgspec.Struct, frozen=True):
    """Usage as the provider states it before it answers: its input is final. It holds where no other one follows."""

    usage: Usage


class UpstreamFailure(msgspec.Struct, frozen=True):
    """The provider says that it failed, by an HTTP status or inside its stream.

    ``code`` is ours and stable: ``upstream_unauthorized``, ``upstream_bad_request``, ``upstream_not_found``,
    ``upstream_rate_limited``, ``upstream_overloaded``, ``upstream_error``, ``upstream_malformed``,
    ``upstream_cut_off``, ``upstream_unreachable``, ``context_length_exceeded``, ``content_filtered``.
    ``retry_after`` in seconds, where the provider asks for a pause.
    """

    code: str
    message: str
    upstream_status: int | None = None
    recoverable: bool = False
    retry_after: float | None = None


class Identity(msgspec.Struct, frozen=True):
    """The provider's own name of the answer, for later look-ups, and the model that really answers."""

    upstream_id: str | None = None
    model: str | None = None


class Alive(msgspec.Struct, frozen=True):
    """A sign of life without a token: a comment or ping. It never counts as a token for deadlines."""


class End(msgspec.Struct, frozen=True):
    """The dialect's own end marker. A stream that closes without it has been cut off."""


Part = (
    Text
    | Reasoning
    | ToolCallPart
    | BinaryPart
    | Finish
    | UsagePart
    | UsageBegun
    | UsageLeftOut
    | UpstreamFailure
    | Identity
    | Alive
    | End
)
