"""Anthropic messages: the parser of their stream."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from schemas.events import Extra
from schemas.usage import Usage, grown
from services.producer.core.dialects.anthropic_blocks import Blocks
from services.producer.core.dialects.anthropic_request import messages_body
from services.producer.core.dialects.failures import failure_in_stream, refusal_of
from services.producer.core.dialects.media import annotation
from services.producer.core.dialects.stream import FAILED_REASONS, EventParser
from services.producer.core.dialects.usage import read_usage
from services.producer.core.dialects.whole_answers import message_events
from services.producer.core.dialects.wire import NO_HEADERS, HttpCall, Parser, endpoint, post, translating
from services.producer.core.parts import (
    Alive,
    AnnotationPart,
    End,
    ExtraPart,
    Finish,
    Identity,
    Reasoning,
    Text,
    UpstreamFailure,
    UsageBegun,
    UsageLeftOut,
    UsagePart,
)
from services.producer.ports import UpstreamRequest

__all__ = ["Anthropic", "AnthropicParser"]

_API_VERSION: Final = "2023-06-01"
_FINISH: Final = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class _Message(msgspec.Struct):
    id: str | None = None
    model: str | None = None
    usage: Any = None


class _Delta(msgspec.Struct):
    type: str = ""
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    signature: str | None = None
    citation: Any = None
    stop_reason: str | None = None
    container: Any = None


class _Event(msgspec.Struct):
    type: str = ""
    index: Any = 0
    delta: _Delta | None = None
    content_block: dict[str, Any] | None = None
    message: _Message | None = None
    usage: Any = None
    error: Any = None


class _Unknown(msgspec.Struct):
    delta: dict[str, Any]


_event: Final = msgspec.json.Decoder(_Event)
_EMPTY: Final = frozenset({"", "text_delta", "thinking_delta", "signature_delta", "citations_delta"})


class Anthropic:
    """The messages API."""

    def request(
        self, call: UpstreamRequest, base_url: str, key: str | None, extra_headers: Mapping[str, str]
    ) -> HttpCall:
        """Return the POST to ``/v1/messages``."""
        own = {"x-api-key": key, "anthropic-version": _API_VERSION}
        with translating():
            body = messages_body(call)
        return post(endpoint(base_url, "/v1", "/messages"), body, own, extra_headers)

    def parser(self, headers: Mapping[str, str] = NO_HEADERS) -> Parser:
        """Return a fresh parser."""
        return AnthropicParser()

    def refusal(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> UpstreamFailure:
        """Return the failure of an error response."""
        return refusal_of(status, headers, body, now)


class AnthropicParser(EventParser[_Event]):
    """Parse a messages stream, which ends with ``message_stop``.

    Usage in ``message_delta`` is cumulative and may lack counts of ``message_start``: both are merged.
    """

    __slots__ = ("_blocks", "_raw_usage", "_usage")
    event_type = _Event

    def __init__(self) -> None:
        super().__init__(_event)
        self._blocks = Blocks(self.joined)
        self._raw_usage: dict[str, Any] = {}
        self._usage: Usage | None = None

    def whole(self, tree: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a message as the events of a stream."""
        return message_events(tree)

    def read(self, event: _Event, payload: bytes) -> None:
        """Handle one event; its ``type`` is in the data, so the event's name is not needed."""
        if event.error:
            self.unknown(payload)
            return
        match event.type:
            case "content_block_delta":
                if event.delta is not None:
                    self._delta(event.delta, event.index, payload)
            case "content_block_start":
                if event.content_block is not None:
                    self._blocks.start(event.index, event.content_block)
            case "content_block_stop":
                self._blocks.stop(event.index)
            case "message_start":
                message = event.message or _Message()
                self.joined.add(Identity(message.id, message.model))
                self._report(message.usage, UsageBegun)
            case "message_delta":
                self._ending(event)
            case "message_stop":
                self.end(End())
            case "ping":
                self.joined.add(Alive())
            case _:
                self.unknown(payload)

    def end(self, part: End | UpstreamFailure) -> None:
        """End the open blocks, then add the last part."""
        if isinstance(part, End):
            self._blocks.stop_all()
        super().end(part)

    def _delta(self, delta: _Delta, index: Any, payload: bytes) -> None:
        if delta.text:
            self.joined.text(Text, delta.text)
        elif delta.thinking:
            self.joined.text(Reasoning, delta.thinking)
        elif delta.partial_json is not None:
            self._blocks.json(index, delta.partial_json)
        elif delta.signature:
            self._blocks.sign(index, delta.signature)
        elif delta.citation:
            self.joined.add(AnnotationPart(annotation(delta.citation)))
        elif delta.type not in _EMPTY:
            self._blocks.extend(index, msgspec.json.decode(payload, type=_Unknown).delta)

    def _ending(self, event: _Event) -> None:
        if event.delta is not None and event.delta.stop_reason:
            reason = event.delta.stop_reason
            if reason.lower() in FAILED_REASONS:
                self._report(event.usage, UsagePart)
                self.end(failure_in_stream({"message": f"the answer ended with {reason!r}", "code": reason}))
                return
            finish = _FINISH.get(reason, reason)
            self._blocks.stop_all(cut=finish in ("length", "content_filter"))
            self.joined.add(Finish(finish))
        if event.delta is not None and event.delta.container:
            self.joined.add(ExtraPart(Extra(kind="container", data=event.delta.container)))
        self._report(event.usage, UsagePart)

    def _report(self, raw: Any, kind: type[UsageBegun | UsagePart]) -> None:
        if isinstance(raw, dict) and raw:
            # a missing count, or 0 where a number was known, adds nothing
            known = self._raw_usage
            self._raw_usage = raw = known | {n: v for n, v in raw.items() if v or n not in known}
        usage, reasons = read_usage(raw)
        if usage is not None:
            self._usage = usage if self._usage is None else grown(self._usage, usage)
            self.joined.add(kind(self._usage))
        elif reasons:
            self.joined.add(UsageLeftOut(reasons))
