"""Build the look-up view of a generation, from the log and, where events have expired, from its record."""

from typing import Any

import msgspec

from schemas.events import AbandonedCall, type_of
from schemas.requests import GenerationRecord
from services.delivery.errors import Deleted, Unknown
from services.delivery.requests.answer import AnswerMessage, BinaryContent, ChoiceAnnotation, ChoiceExtra, ToolCallText
from services.delivery.requests.generations import ENDED, Lookups
from services.delivery.requests.transcript import Alternative, Transcript
from services.kit.jetstream.broker import BrokerUnavailable

__all__ = ["GenerationView", "view_of"]


class GenerationView(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A generation with what it has said so far.

    ``counted`` and ``usage`` are those of the call that it ended with; ``abandoned_calls`` are those made before it,
    each with its own.
    ``beginning_expired``: the log no longer keeps its first events; what is shown begins in the middle.
    """

    session: str
    generation: str
    state: str
    model: str = ""
    provider: str = ""
    upstream_model: str = ""
    created_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    finish_reason: str | None = None
    code: str | None = None
    message: str | None = None
    text: str = ""
    choices: list[str] = []
    alternatives: list[Alternative] = []
    reasoning: str = ""
    refusal: str = ""
    tool_calls: list[ToolCallText] = []
    annotations: list[ChoiceAnnotation] = []
    binaries: list[BinaryContent] = []
    extras: list[ChoiceExtra] = []
    messages: list[AnswerMessage] = []
    events: int = 0
    beginning_expired: bool = False
    counted: Any = None
    usage: Any = None
    abandoned_calls: list[AbandonedCall] = []
    metadata: dict[str, str] = {}


async def view_of(lookups: Lookups, tenant: str, session: str, generation: str) -> GenerationView:
    """Return the look-up view of a generation.

    Raises:
        Unknown: the generation does not exist.
        BrokerUnavailable: the log cannot be read.
    """
    try:
        found = await lookups.get(tenant, session, generation)
    except BrokerUnavailable:
        found = None  # the log is authoritative
    transcript = await lookups.transcript(tenant, session, generation)
    if found is None and not transcript.events:
        raise Unknown(f"session {session!r} has no generation {generation!r}")
    record = found[0] if found else None
    if record is not None and record.state == "deleted":
        raise Deleted(f"session {session!r} was deleted, and generation {generation!r} with it")
    started, terminal = transcript.started, transcript.terminal
    # The log is authoritative; the record fills in expired events and the end noted by the producer.
    expired = transcript.headless or not transcript.events
    noted = record if record is not None and expired and terminal is None else None
    return GenerationView(
        session=session,
        generation=generation,
        state=_state(transcript, record, expired),
        model=record.model if record else (started.model if started else ""),
        provider=record.provider if record and record.provider else (started.provider if started else ""),
        upstream_model=started.upstream_model if started else (record.upstream_model or "" if record else ""),
        created_at=record.created_at if record else None,
        started_at=started.at if started else (record.started_at if record and expired else None),
        ended_at=terminal.at if terminal else (noted.ended_at if noted else None),
        finish_reason=getattr(terminal, "finish_reason", None) or (noted.finish_reason if noted else None),
        code=getattr(terminal, "code", None) or (noted.code if noted else None),
        message=getattr(terminal, "message", None),
        text=transcript.text,
        choices=transcript.choices,
        alternatives=transcript.alternatives,
        reasoning=transcript.reasoning,
        refusal=transcript.refusal,
        tool_calls=transcript.tool_calls,
        annotations=[annotation for answer in transcript.answers for annotation in answer.annotations],
        binaries=[binary for answer in transcript.answers for binary in answer.files()],
        extras=[extra for answer in transcript.answers for extra in answer.extras],
        messages=transcript.messages,
        events=transcript.events,
        beginning_expired=transcript.headless,
        counted=(noted.counted if noted else None) or transcript.counted(),
        usage=transcript.usage or (record.usage if record and expired else None),
        abandoned_calls=transcript.abandoned_calls,
        metadata=started.metadata if started else (record.metadata if record else {}),
    )


def _state(transcript: Transcript, record: GenerationRecord | None, expired: bool) -> str:
    if transcript.terminal is not None:
        return type_of(transcript.terminal)
    if record is not None and (record.state == "cancelling" or (expired and record.state in ENDED)):
        return record.state
    return "running" if transcript.events or (record is not None and record.state == "running") else "queued"
