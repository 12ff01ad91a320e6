"""Parts of a provider's stream in a form common to all providers: the output of every dialect's parser."""

import msgspec

from schemas.events import Annotation, Binary, Extra, Signature, ToolCall
from schemas.usage import Usage

__all__ = [
    "Alive",
    "AnnotationPart",
    "BinaryPart",
    "End",
    "ExtraPart",
    "Finish",
    "Identity",
    "NoticePart",
    "Omitted",
    "Part",
    "Reasoning",
    "Refusal",
    "SignaturePart",
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


class Refusal(msgspec.Struct, frozen=True):
    """Text with which the model refuses to answer."""

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


class AnnotationPart(msgspec.Struct, frozen=True):
    """A source of the answer."""

    annotation: Annotation
    choice: int = 0
    at: float | None = None


class SignaturePart(msgspec.Struct, frozen=True):
    """Opaque text that the provider wants back when the conversation goes on."""

    signature: Signature
    choice: int = 0
    at: float | None = None


class ExtraPart(msgspec.Struct, frozen=True):
    """Content for which there is no other part."""

    extra: Extra
    choice: int = 0
    at: float | None = None


class Omitted(msgspec.Struct, frozen=True):
    """Content that came and cannot be kept, of this kind, and why."""

    kind: str
    reason: str


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
    """A failure that the provider reports, by an HTTP status or inside its stream.

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


class NoticePart(msgspec.Struct, frozen=True):
    """Something odd in the provider's stream that did not end the answer; ``code`` is stable."""

    code: str
    message: str


class Alive(msgspec.Struct, frozen=True):
    """A sign of life without a token: a comment or ping. It never counts as a token for deadlines."""


class End(msgspec.Struct, frozen=True):
    """The answer is complete: its end marker came, or its finish reasons and a proper end of the HTTP body."""


Part = (
    Text
    | Reasoning
    | Refusal
    | ToolCallPart
    | BinaryPart
    | AnnotationPart
    | SignaturePart
    | ExtraPart
    | Omitted
    | Finish
    | UsagePart
    | UsageBegun
    | UsageLeftOut
    | UpstreamFailure
    | Identity
    | NoticePart
    | Alive
    | End
)
