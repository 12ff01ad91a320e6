"""Anthropic messages: the parser of their stream."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from schemas.events import ToolCall
from schemas.usage import Usage, grown
from services.producer.core.dialects.anthropic_request import messages_body
from services.producer.core.dialects.failures import failure_in_stream, refusal_of
from services.producer.core.dialects.stream import EventParser
from services.producer.core.dialects.usage import read_usage
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
    UsageLeftOut,
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


class _Message(msgspec.Struct):
    id: str | None = None
    model: str | None = None
    usage: Any = None


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
    type: str
    index: int = 0
    delta: _Delta | None = None
    content_block: _Block | None = None
    message: _Message | None = None
    usage: Any = None
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


class AnthropicParser(EventParser):
    """Understands a messages stream, which ends with ``message_stop``; unknown events are passed over.

    Usage in ``message_delta`` is cumulative and may leave out what ``message_start`` said: both are merged.
    """

    __slots__ = ("_raw_usage", "_tools", "_usage", "_wordless")

    def __init__(self) -> None:
        super().__init__()
        self._tools: dict[int, int] = {}
        self._wordless: set[int] = set()
        self._raw_usage: dict[str, Any] = {}
        self._usage: Usage | None = None

    def read(self, payload: bytes) -> None:
        """Take one event; its ``type`` is in the data, so the event's name is not needed."""
        event = _event.decode(payload)
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
                self.joined.add(Identity(message.id, message.model))
                self._report(message.usage, UsageBegun)
            case "message_delta":
                self._ending(event)
            case "message_stop":
                self.end(End())
            case "error":
                self.end(failure_in_stream(event.error))
            case "ping":
                self.joined.add(Alive())

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
            self.joined.add(Finish(_FINISH.get(reason, reason)))
        self._report(event.usage, UsagePart)

    def _report(self, raw: Any, kind: type[UsageBegun | UsagePart]) -> None:
        if isinstance(raw, dict) and raw:
            # what is left out, or 0 where a number was known, says nothing new
            known = self._raw_usage
            self._raw_usage = raw = known | {n: v for n, v in raw.items() if v or n not in known}
        usage, reasons = read_usage(raw)
        if usage is not None:
            self._usage = usage if self._usage is None else grown(self._usage, usage)
            self.joined.add(kind(self._usage))
        elif reasons:
            self.joined.add(UsageLeftOut(reasons))
