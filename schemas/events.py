"""Events of a generation: the records of the log.

Every event is a tagged msgspec struct (``type`` names it) and carries its schema version ``v``. Unknown fields are
ignored when read, so that a newer writer never breaks an older reader. An absent ``v`` means 1, for ever. What an older
reader could misread is not a new version of a type but a new type, which it skips.
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
"""The schema's version. As the default of ``v`` it is left out when written, so this default never changes."""


class Event(msgspec.Struct, tag_field="type", kw_only=True, omit_defaults=True):
    """What all events have.

    ``generation``: the generation's name. ``seq``: 0, 1, 2 … within it, without gaps. ``epoch``: 1, 2 …, which attempt
    of a producer wrote the event. ``at``: when it was written, in seconds since 1970 (the producer's clock; never used
    to order events). ``v``: the schema's version.
    """

    generation: str
    seq: Number
    epoch: Epoch = 1
    at: float = 0.0
    v: int = VERSION


class Started(Event, tag="started"):
    """A producer has taken the request.

    ``model`` is what was asked for; ``provider`` and ``upstream_model`` who answers. ``counted`` holds the input count.
    ``metadata`` is the request's own, unchanged; ``key`` names the credential that asked.
    """

    model: str
    provider: str
    upstream_model: str
    counted: Counted = Counted()
    metadata: dict[str, str] = {}
    key: str = ""


class ToolCall(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """A fragment of one tool call.

    Fragments of the same choice and ``index`` belong together, their ``arguments`` are joined as text. ``signature``:
    opaque text that the provider wants back with this call when the conversation goes on.
    """

    index: Number = 0
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    signature: str | None = None


class Binary(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """Bytes that a model emitted (base64 in JSON), for instance audio or an image.

    ``continues``: they follow the bytes of the choice's binary before, as in streamed audio or in a file that is too
    large for one event.
    """

    media_type: str
    data: bytes
    continues: bool = False


class Annotation(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """A source of the answer.

    ``kind`` is the provider's word (``url_citation``, ``search_result``, ``char_location`` …). ``quote``: the words of
    the source. ``start`` and ``end``: the characters of the answer that rest on it. ``number``: by which the answer
    refers to it, as in [1]. ``raw`` keeps the provider's own object unchanged.
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
    """Opaque text that a provider wants back, unchanged, when the conversation goes on.

    ``thinking``, ``thinking_blocks``, ``reasoning.text``: the proof of the choice's reasoning since the last signature.
    ``redacted_thinking``, ``reasoning.encrypted``: reasoning that only the provider can read. ``thought_signature``:
    of the choice as a whole. ``details`` are further fields that go back with it.
    """

    kind: str
    data: str
    details: dict[str, Any] = {}


class Extra(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """Content for which there is no field: ``kind`` is the provider's word for it, ``data`` any JSON."""

    kind: str
    data: Any = None


class Delta(Event, tag="delta"):
    """What the model emitted since the last delta: exactly one kind of content.

    Text, reasoning, a refusal, a tool-call fragment, binary, an annotation, a signature, or something extra; a reader
    skips the kinds that it does not know.

    ``choice``: index of the alternative answer. ``tokens``: output tokens counted so far over the whole generation.
    ``provider_at``: the provider's own time stamp of the chunk in seconds since 1970, where it gives one.
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
    """A call whose answer had begun and did not become the generation's: it broke off, failed, or lost its producer.

    ``number`` counts these calls within the generation, from 1. ``code``: why it was abandoned, as in `Failed`, or
    ``producer_lost``. ``counted``: our own count of this call alone. ``usage``: what its provider reported of it, and
    ``source``, as in `UsageReported`, where that came from; both are left out where nothing was reported.
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
    """Something a watcher may want to know and need not act on; ``code`` is stable, ``message`` is for people.

    ``call``: the call that a retry or failover leaves behind, where its answer had begun.
    """

    code: str
    message: str = ""
    attempt: int | None = None
    provider: str | None = None
    upstream_model: str | None = None
    delay: float | None = None
    call: AbandonedCall | None = None


class Restarted(Event, tag="restarted"):
    """The answer begins again in a new epoch: a client forgets what it has shown of this generation.

    ``call``: the call whose text is taken back.
    """

    reason: str
    provider: str = ""
    upstream_model: str = ""
    call: AbandonedCall | None = None


class UsageReported(Event, tag="usage"):
    """The usage that the provider reported. The only event accepted after a terminal. The newest one holds.

    ``call``: the number of the abandoned call that it is about; 0 for the call that the generation ended with.
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
    word); ``finish_reasons`` gives it for each choice where there are several.
    """

    finish_reason: str
    finish_reasons: list[str] = []
    counted: Counted = Counted()


class Failed(Event, tag="failed"):
    """Terminal: it went wrong. ``code`` is stable and typed, ``recoverable`` says whether asking again may help."""

    code: str
    message: str = ""
    upstream_status: int | None = None
    recoverable: bool = False
    counted: Counted = Counted()


class Cancelled(Event, tag="cancelled"):
    """Terminal: stopped by wish (``reason``: ``requested`` or ``disconnected``)."""

    reason: str
    counted: Counted = Counted()


class Interrupted(Event, tag="interrupted"):
    """Terminal: its producer was lost and another one closed it."""

    reason: str
    counted: Counted = Counted()


AnyEvent = Started | Delta | Notice | Restarted | UsageReported | Completed | Failed | Cancelled | Interrupted

TERMINAL_TYPES = frozenset({"completed", "failed", "cancelled", "interrupted"})
_TERMINALS = (Completed, Failed, Cancelled, Interrupted)


def is_terminal(event: Event) -> bool:
    """Tell whether ``event`` ends its generation."""
    return isinstance(event, _TERMINALS)


def type_of(event: Event) -> str:
    """Return the event's ``type`` as it stands in the log."""
    return str(type(event).__struct_config__.tag)
