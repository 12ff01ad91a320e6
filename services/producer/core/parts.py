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
    """Answer text. ``at``: the provider's time stamp of the chunk in seconds since 1970, if it has one."""

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
    """Opaque text to send back to the provider when the conversation continues."""

    signature: Signature
    choice: int = 0
    at: float | None = None


class ExtraPart(msgspec.Struct, frozen=True):
    """Content for which there is no other part."""

    extra: Extra
    choice: int = 0
    at: float | None = None


class Omitted(msgspec.Struct, frozen=True):
    """Content of this kind that cannot be stored, and the reason."""

    kind: str
    reason: str


class Finish(msgspec.Struct, frozen=True):
    """One choice ended. ``reason``: ``stop``, ``length``, ``tool_calls``, ``content_filter`` or the provider's term."""

    reason: str
    choice: int = 0


class UsagePart(msgspec.Struct, frozen=True):
    """Usage as reported so far; of several reports of one answer the larger counts are kept."""

    usage: Usage


class UsageLeftOut(msgspec.Struct, frozen=True):
    """An unreadable usage report. ``reasons``: a subset of `schemas.usage.USAGE_REASONS`."""

    reasons: tuple[str, ...]


class UsageBegun(msgspec.Struct, frozen=True):
    """Usage as reported before the answer: its input is final. It is used if no other report follows."""

    usage: Usage


class UpstreamFailure(msgspec.Struct, frozen=True):
    """A failure that the provider reports, by an HTTP status or inside its stream.

    ``code`` is ours and stable: ``upstream_unauthorized``, ``upstream_bad_request``, ``upstream_not_found``,
    ``upstream_rate_limited``, ``upstream_overloaded``, ``upstream_error``, ``upstream_malformed``,
    ``upstream_cut_off``, ``upstream_unreachable``, ``context_length_exceeded``, ``content_filtered``.
    ``retry_after``: seconds, if the provider requests a pause.
    """

    code: str
    message: str
    upstream_status: int | None = None
    recoverable: bool = False
    retry_after: float | None = None


class Identity(msgspec.Struct, frozen=True):
    """The provider's identifier of the answer, for later look-ups, and the model that answers."""

    upstream_id: str | None = None
    model: str | None = None


class NoticePart(msgspec.Struct, frozen=True):
    """An irregularity in the provider's stream that did not end the answer; ``code`` is stable."""

    code: str
    message: str


class Alive(msgspec.Struct, frozen=True):
    """A comment or ping: the connection is alive. It never counts as a token for deadlines."""


class End(msgspec.Struct, frozen=True):
    """The answer is complete: by its end marker, or by its finish reasons and a proper end of the HTTP body."""


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
