"""Events of a generation: the records of the log.

Every event is a tagged msgspec struct (``type`` names it) and carries its schema version ``v``. Unknown fields are
ignored when read, so that a newer writer never breaks an older reader. An absent ``v`` always means 1. A change that an
older reader could misread becomes a new type, which it skips, instead of a new version.
"""

from typing import Annotated, Any

import msgspec

from schemas.usage import MAX_NUMBER, Counted, Epoch, Number, Usage

__all__ = [
    "TERMINAL_TYPES",
    "VERSION",
    "AbandonedCall",
    "Annotation",
    "AnyEvent",
    "Binary",
    "Cancelled",
    "Completed",
    "Delta",
    "Epoch",
    "Event",
    "Extra",
    "Failed",
    "Interrupted",
    "Number",
    "Notice",
    "Restarted",
    "Signature",
    "Started",
    "ToolCall",
    "UsageReported",
    "is_terminal",
    "type_of",
]

VERSION = 1
"""The schema's version. It is the default of ``v`` and omitted when written, so it never changes."""


class Event(msgspec.Struct, tag_field="type", kw_only=True, omit_defaults=True):
    """Fields of all events.

    ``generation``: the generation's name. ``seq``: 0, 1, 2 … within it, without gaps. ``epoch``: 1, 2 …, the attempt
    of a producer that wrote the event. ``at``: time of writing in seconds since 1970 (the producer's clock; never used
    to order events). ``v``: the schema's version.
    """

    generation: str
    seq: Number
    epoch: Epoch = 1
    at: float = 0.0
    v: int = VERSION


class Started(Event, tag="started"):
    """A producer has taken the request.

    ``model``: the requested model; ``provider`` and ``upstream_model``: the ones that answer. ``counted`` holds the
    input count. ``metadata``: the request's own, unchanged. ``key`` names the credential of the request.
    """

    model: str
    provider: str
    upstream_model: str
    counted: Counted = Counted()
    metadata: dict[str, str] = {}
    key: str = ""


class ToolCall(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """A fragment of one tool call.

    Fragments of the same choice and ``index`` belong together; their ``arguments`` are joined as text. ``signature``:
    opaque text to send back to the provider with this call when the conversation continues.
    """

    index: Number = 0
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    signature: str | None = None


class Binary(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """Bytes that a model emitted (base64 in JSON), for instance audio or an image.

    ``continues``: the bytes continue the choice's previous binary, as in streamed audio or in a file that is too large
    for one event.
    """

    media_type: str
    data: bytes
    continues: bool = False


class Annotation(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """A source of the answer.

    ``kind``: the provider's term (``url_citation``, ``search_result``, ``char_location`` …). ``quote``: the quoted text
    of the source. ``start`` and ``end``: the range of characters in the answer that it supports. ``number``: its number
    in the answer, as in [1]. ``raw`` keeps the provider's own object unchanged.
    """

    kind: str
    url: str | None = None
    title: str | None = None
    quote: str | None = None
    start: Number | None = None
    end: Number | None = None
    number: Number | None = None
    raw: Any = None


class Signature(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """Opaque text to send back to the provider, unchanged, when the conversation continues.

    ``thinking``, ``thinking_blocks``, ``reasoning.text``: signs the choice's reasoning since the last signature.
    ``redacted_thinking``, ``reasoning.encrypted``: reasoning that only the provider can read. ``thought_signature``:
    signs the choice as a whole. ``details``: further fields to send back with it.
    """

    kind: str
    data: str
    details: dict[str, Any] = {}


class Extra(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """Content for which there is no field: ``kind`` is the provider's term for it, ``data`` any JSON."""

    kind: str
    data: Any = None


class Delta(Event, tag="delta"):
    """What the model emitted since the last delta: exactly one kind of content.

    Text, reasoning, a refusal, a tool-call fragment, binary, an annotation, a signature, or extra content; a reader
    skips unknown kinds.

    ``choice``: index of the alternative answer. ``tokens``: output tokens counted so far over the whole generation.
    ``provider_at``: the provider's own time stamp of the chunk in seconds since 1970, if it has one.
    """

    choice: Number = 0
    text: str | None = None
    reasoning: str | None = None
    tool_call: ToolCall | None = None
    binary: Binary | None = None
    refusal: str | None = None
    annotation: Annotation | None = None
    signature: Signature | None = None
    extra: Extra | None = None
    tokens: Number = 0
    provider_at: float | None = None


class AbandonedCall(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """A call whose answer had begun and was abandoned: it broke off, failed, or lost its producer.

    ``number`` counts these calls within the generation, from 1. ``code``: the reason, as in `Failed`, or
    ``producer_lost``. ``counted``: Tailrace's own count of this call alone. ``usage``: the provider's report for this
    call, and ``source`` its origin, as in `UsageReported`; both are omitted without a report.
    """

    number: Annotated[int, msgspec.Meta(ge=1, le=MAX_NUMBER)]
    code: str = ""
    provider: str = ""
    upstream_model: str = ""
    upstream_id: str | None = None
    counted: Counted = Counted()
    usage: Usage | None = None
    source: str = ""


class Notice(Event, tag="notice"):
    """Information that requires no action; ``code`` is stable, ``message`` is for people.

    ``call``: the call that a retry or failover abandons, if its answer had begun.
    """

    code: str
    message: str = ""
    attempt: int | None = None
    provider: str | None = None
    upstream_model: str | None = None
    delay: float | None = None
    call: AbandonedCall | None = None


class Restarted(Event, tag="restarted"):
    """The answer begins again in a new epoch: a client discards what it has shown of this generation.

    ``call``: the abandoned call, whose text is void.
    """

    reason: str
    provider: str = ""
    upstream_model: str = ""
    call: AbandonedCall | None = None


class UsageReported(Event, tag="usage"):
    """The usage that the provider reported. The only event accepted after a terminal. The newest one is valid.

    ``call``: the number of the abandoned call that it belongs to; 0 for the call that the generation ended with.
    """

    usage: Usage
    provider: str = ""
    upstream_model: str = ""
    upstream_id: str | None = None
    source: str = "stream"
    call: Number = 0


class Completed(Event, tag="completed"):
    """Terminal: the provider ended the answer, by its end marker or by a finish reason and a proper end of the body.

    ``finish_reason`` is normalised (``stop``, ``length``, ``tool_calls``, ``content_filter``, or the provider's own
    term); ``finish_reasons`` has it for each of several choices.
    """

    finish_reason: str
    finish_reasons: list[str] = []
    counted: Counted = Counted()


class Failed(Event, tag="failed"):
    """Terminal: the generation failed. ``code`` is stable and typed; ``recoverable``: whether a retry may help."""

    code: str
    message: str = ""
    upstream_status: int | None = None
    recoverable: bool = False
    counted: Counted = Counted()


class Cancelled(Event, tag="cancelled"):
    """Terminal: cancelled (``reason``: ``requested`` or ``disconnected``)."""

    reason: str
    counted: Counted = Counted()


class Interrupted(Event, tag="interrupted"):
    """Terminal: its producer was lost and another producer closed it."""

    reason: str
    counted: Counted = Counted()


AnyEvent = Started | Delta | Notice | Restarted | UsageReported | Completed | Failed | Cancelled | Interrupted

TERMINAL_TYPES = frozenset({"completed", "failed", "cancelled", "interrupted"})
_TERMINALS = (Completed, Failed, Cancelled, Interrupted)


def is_terminal(event: Event) -> bool:
    """Return whether ``event`` ends its generation."""
    return isinstance(event, _TERMINALS)


def type_of(event: Event) -> str:
    """Return the event's ``type`` as stored in the log."""
    return str(type(event).__struct_config__.tag)
