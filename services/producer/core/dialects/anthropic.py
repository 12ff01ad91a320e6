"""Anthropic messages: the parser of their stream."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from schemas.events import ToolCall
from schemas.usage import Usage
from services.producer.core.dialects.anthropic_request import messages_body
from services.producer.core.dialects.failures import failure_in_stream, refusal_of
from services.producer.core.dialects.leniency import fit
from services.producer.core.dialects.stream import FAILED_REASONS, EventParser
from services.producer.core.dialects.whole_answers import message_events
from services.producer.core.dialects.wire import NO_HEADERS, HttpCall, Parser, endpoint, post, translating
from services.producer.core.parts import (
    Alive,
    End,
    Finish,
    Identity,
    Reasoning,
    Text,
    UpstreamFailure,
    UsageBegun,
    UsagePart,
)
from services.producer.ports import Call

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


class _OutputDetails(msgspec.Struct):
    thinking_tokens: int | None = None


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens_details: _OutputDetails | None = None


class _Message(msgspec.Struct):
    id: str | None = None
    model: str | None = None
    usage: dict[str, Any] | None = None


class _Block(msgspec.Struct):
    type: str = ""
    id: str | None = None
    name: str | None = None
    text: str | None = None
    thinking: str | None = None
    input: Any = None


class _Delta(msgspec.Struct):
    type: str = ""
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None


class _Event(msgspec.Struct):
    type: str = ""
    index: int = 0
    delta: _Delta | None = None
    content_block: _Block | None = None
    message: _Message | None = None
    usage: dict[str, Any] | None = None
    error: Any = None


_event: Final = msgspec.json.Decoder(_Event)


class Anthropic:
    """The messages API."""

    def request(self, call: Call, base_url: str, key: str | None, extra_headers: Mapping[str, str]) -> HttpCall:
        """Return the POST to ``/v1/messages``."""
        own = {"x-api-key": key, "anthropic-version": _API_VERSION}
        with translating():
            body = messages_body(call)
        return post(endpoint(base_url, "/v1", "/messages"), body, own, extra_headers)

    def parser(self, headers: Mapping[str, str] = NO_HEADERS) -> Parser:
        """Return a fresh parser."""
        return AnthropicParser()

    def refusal(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> UpstreamFailure:
        """Return what an error answer means."""
        return refusal_of(status, headers, body, now)


class AnthropicParser(EventParser[_Event]):
    """Understands a messages stream, which ends with ``message_stop``.

    Usage in ``message_delta`` is cumulative and may leave out what ``message_start`` said: both are merged.
    """

    __slots__ = ("_tools", "_usage", "_wordless")
    event_type = _Event

    def __init__(self) -> None:
        super().__init__(_event)
        self._tools: dict[int, int] = {}
        self._wordless: set[int] = set()
        self._usage: dict[str, Any] = {}

    def whole(self, tree: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a message as the events of a stream."""
        return message_events(tree)

    def read(self, event: _Event, payload: bytes) -> None:
        """Take one event; its ``type`` is in the data, so the event's name is not needed."""
        if event.error:
            self.unknown(payload)
            return
        match event.type:
            case "content_block_delta":
                if event.delta is not None:
                    self._delta(event.delta, event.index)
            case "content_block_start":
                if event.content_block is not None:
                    self._block(event.content_block, event.index)
            case "content_block_stop":
                self._close(event.index)
            case "message_start":
                message = event.message or _Message()
                self._usage = message.usage or {}
                self.joined.add(Identity(message.id, message.model))
                if self._usage:
                    self.joined.add(UsageBegun(_normalised(self._usage)))
            case "message_delta":
                self._ending(event)
            case "message_stop":
                self.end(End())
            case "ping":
                self.joined.add(Alive())
            case _:
                self.unknown(payload)

    def _block(self, block: _Block, index: int) -> None:
        if block.type == "tool_use":
            number = self._tools[index] = len(self._tools)
            arguments = msgspec.json.encode(block.input).decode() if block.input else ""
            if not arguments:
                self._wordless.add(index)
            self.joined.tool_call(ToolCall(index=number, id=block.id, name=block.name, arguments=arguments))
        elif block.type == "text" and block.text:
            self.joined.text(Text, block.text)
        elif block.type == "thinking" and block.thinking:
            self.joined.text(Reasoning, block.thinking)

    def _delta(self, delta: _Delta, index: int) -> None:
        if delta.text:
            self.joined.text(Text, delta.text)
        elif delta.thinking:
            self.joined.text(Reasoning, delta.thinking)
        elif delta.partial_json and index in self._tools:
            self._wordless.discard(index)
            self.joined.tool_call(ToolCall(index=self._tools[index], arguments=delta.partial_json))

    def _close(self, index: int) -> None:
        # A tool without parameters streams no JSON at all; readers of tool calls expect an object.
        if index in self._wordless:
            self._wordless.discard(index)
            self.joined.tool_call(ToolCall(index=self._tools[index], arguments="{}"))

    def _ending(self, event: _Event) -> None:
        if event.delta is not None and event.delta.stop_reason:
            reason = event.delta.stop_reason
            if reason.lower() in FAILED_REASONS:
                self.end(failure_in_stream({"message": f"the answer ended with {reason!r}", "code": reason}))
                return
            self.joined.add(Finish(_FINISH.get(reason, reason)))
        if event.usage is not None:
            self._usage |= {name: value for name, value in event.usage.items() if value is not None}
            self.joined.add(UsagePart(_normalised(self._usage)))


def _normalised(raw: dict[str, Any]) -> Usage:
    usage = fit(raw, _Usage)
    written = usage.cache_creation_input_tokens or 0
    cached = usage.cache_read_input_tokens or 0
    details = usage.output_tokens_details or _OutputDetails()
    return Usage(
        input=(usage.input_tokens or 0) + written + cached,
        output=usage.output_tokens or 0,
        cached_input=cached,
        cache_write=written,
        reasoning=details.thinking_tokens or 0,
        raw=dict(raw),
    )
