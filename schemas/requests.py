"""A request for a generation, as queued, and the look-up record of a generation."""

from typing import Annotated, Any, Final, Literal

import msgspec

from schemas.events import VERSION
from schemas.usage import Counted, Usage

__all__ = [
    "ENVELOPE",
    "LARGEST_PAYLOAD",
    "Announcement",
    "CancelAfter",
    "DeletedSession",
    "GenerationRecord",
    "GenerationState",
    "Message",
    "OnDisconnect",
    "OnProducerLoss",
    "Priority",
    "Request",
    "RequestDeadlines",
]

ENVELOPE: Final = 65_536
"""Bytes added to the client's body at most, in the work queue or in a WebSocket message."""
LARGEST_PAYLOAD: Final = 64 * 1024 * 1024
"""The largest ``max_payload`` that nats-server accepts."""
GenerationState = Literal[
    "queued", "running", "cancelling", "completed", "failed", "cancelled", "interrupted", "deleted"
]
"""``deleted``: its session was deleted; the record is kept unlisted for a while so that its name is not reused."""


class Message(msgspec.Struct, omit_defaults=True):
    """One message of the conversation. ``content`` is text, or a list of parts in the OpenAI chat form.

    ``tool_calls``, ``tool_call_id``, ``name``, ``refusal``, ``annotations`` and ``audio`` are those of the OpenAI chat
    form; each provider's dialect translates. Parts of a provider's earlier answers are sent back to it unchanged:
    Anthropic's blocks as parts of ``content`` (``thinking`` with its ``signature``, ``redacted_thinking``, blocks of
    tools that it runs itself), ``reasoning_details`` (OpenRouter), ``reasoning_content`` or ``reasoning`` (DeepSeek,
    vLLM and others), ``thinking_blocks`` (LiteLLM), ``extra_content`` (Gemini, here and in ``tool_calls``),
    ``tool_plan`` (Cohere).
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    refusal: str | None = None
    annotations: list[dict[str, Any]] | None = None
    audio: dict[str, Any] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    reasoning_details: list[dict[str, Any]] | None = None
    thinking_blocks: list[dict[str, Any]] | None = None
    extra_content: dict[str, Any] | None = None
    tool_plan: str | None = None


class CancelAfter(msgspec.Struct, forbid_unknown_fields=True):
    """Cancel the generation after this many seconds without a subscriber."""

    cancel_after: Annotated[float, msgspec.Meta(ge=0)]


OnDisconnect = Literal["continue"] | CancelAfter
OnProducerLoss = Literal["interrupt", "restart"]
Priority = Literal["interactive", "batch"]


class RequestDeadlines(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A request's own deadlines in seconds, each within bounds; ``None`` keeps the model's.

    ``connect``: until the provider's answer begins. ``first_token``: from the call to the first token.
    ``between_tokens``: between two tokens. ``total``: for the whole generation, retries included.
    """

    connect: Annotated[float, msgspec.Meta(ge=1, le=30)] | None = None
    first_token: Annotated[float, msgspec.Meta(ge=5, le=30)] | None = None
    between_tokens: Annotated[float, msgspec.Meta(ge=10, le=60)] | None = None
    total: Annotated[float, msgspec.Meta(ge=10, le=3_600)] | None = None


class Request(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A request with all that a producer needs to run the generation. ``created_at``: seconds since 1970.

    ``partition``: the session's partition, as determined by delivery; producers never compute it.

    ``key`` names the credential of the request, for bills and limits; ``request_hash`` goes into the look-up record.
    ``on_producer_loss``: whether a begun answer whose producer or provider was lost is closed, or requested again from
    the beginning. ``priority``: which requests wait longer when capacity is scarce.
    ``params``: sampling and tool parameters in the OpenAI chat form (``temperature``, ``max_tokens``, ``tools`` …).
    """

    tenant: str
    session: str
    generation: str
    model: str
    messages: list[Message]
    params: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    on_disconnect: OnDisconnect = "continue"
    on_producer_loss: OnProducerLoss = "interrupt"
    priority: Priority = "interactive"
    deadlines: RequestDeadlines = RequestDeadlines()
    created_at: float = 0.0
    partition: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    key: str = ""
    request_hash: str = ""
    v: int = VERSION


class Announcement(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The models that the producers of a pool can call: as ``provider/model``, or by aliases of such models.

    ``models`` lists all models of a provider with fixed models; other providers are not listed.
    """

    aliases: dict[str, list[str]] = {}
    providers: list[str] = []
    models: dict[str, list[str]] = {}
    v: int = VERSION

    def knows(self, model: str) -> bool:
        """Return whether ``model`` can be resolved; the provider may still reject it."""
        provider, slash, rest = model.partition("/")
        if model in self.aliases:
            return True
        if not (slash and rest) or provider not in self.providers:
            return False
        return rest in self.models.get(provider, (rest,))

    def names(self) -> list[str]:
        """Return the names to request: aliases, listed models, and ``provider/…`` for providers without a list."""
        listed = [f"{provider}/{model}" for provider, models in sorted(self.models.items()) for model in models]
        return [*sorted(self.aliases), *listed, *(f"{name}/…" for name in self.providers if name not in self.models)]

    def candidates(self, model: str) -> list[str]:
        """Return the candidates for a model's name, as ``provider/model``."""
        return self.aliases.get(model) or ([model] if self.knows(model) else [])


class GenerationRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """State of a generation for look-ups and lists; the log is authoritative. Times in seconds since 1970.

    ``key`` names the credential of the request.
    ``request_hash`` detects a repeated ``Idempotency-Key`` with another body.
    """

    tenant: str
    session: str
    generation: str
    state: GenerationState
    model: str
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    provider: str = ""
    upstream_model: str = ""
    finish_reason: str | None = None
    code: str | None = None
    counted: Counted | None = None
    usage: Usage | None = None
    metadata: dict[str, str] = {}
    key: str = ""
    request_hash: str = ""
    v: int = VERSION


class DeletedSession(msgspec.Struct, kw_only=True):
    """A deleted session. The look-up bucket keeps it as long as the log would have kept its events.

    ``partition`` and ``incarnation``: the stream that kept it; ``through``: the last stream sequence that may have been
    one of its events. ``deleted_at``: seconds since 1970.
    """

    tenant: str
    session: str
    partition: int
    incarnation: str
    through: int
    deleted_at: float
    v: int = VERSION
