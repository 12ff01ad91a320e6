"""Cohere v2 chat: request and stream."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from schemas.events import ToolCall
from schemas.requests import Message
from services.producer.core.dialects.failures import failure_in_stream, refusal_of
from services.producer.core.dialects.stream import EventParser
from services.producer.core.dialects.usage import read_usage
from services.producer.core.dialects.wire import (
    NO_HEADERS,
    HttpCall,
    Parser,
    UntranslatableCall,
    endpoint,
    post,
    translating,
)
from services.producer.core.parts import (
    End,
    Finish,
    Identity,
    Reasoning,
    Text,
    UpstreamFailure,
    UsageLeftOut,
    UsagePart,
)
from services.producer.ports import Call

__all__ = ["Cohere", "CohereParser"]

_FINISH: Final = {
    "COMPLETE": "stop",
    "STOP_SEQUENCE": "stop",
    "MAX_TOKENS": "length",
    "TOOL_CALL": "tool_calls",
    "ERROR_LIMIT": "length",
    "ERROR_TOXIC": "content_filter",
}
_FAILED: Final = {"ERROR", "TIMEOUT"}
_SAME: Final = (
    "temperature",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "logprobs",
    "k",
    "p",
    "thinking",
    "safety_mode",
    "strict_tools",
    "documents",
    "citation_options",
    "priority",
)
_RENAMED: Final = {"top_p": "p", "top_k": "k", "max_tokens": "max_tokens", "max_completion_tokens": "max_tokens"}


class _Content(msgspec.Struct):
    text: str | None = None
    thinking: str | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    id: str | None = None
    function: _Function | None = None


class _Message(msgspec.Struct):
    # message-start brings empty lists where the later events bring one object
    content: _Content | list[Any] | None = None
    tool_plan: str | None = None
    tool_calls: _ToolCall | list[Any] | None = None


class _Delta(msgspec.Struct):
    message: _Message | None = None
    finish_reason: str | None = None
    usage: Any = None
    error: Any = None


class _Event(msgspec.Struct):
    type: str = ""
    index: int = 0
    id: str | None = None
    delta: _Delta | None = None


_event: Final = msgspec.json.Decoder(_Event)


class Cohere:
    """The v2 chat API."""

    def request(self, call: Call, base_url: str, key: str | None, extra_headers: Mapping[str, str]) -> HttpCall:
        """Return the POST to ``/v2/chat``."""
        own = {"authorization": f"Bearer {key}" if key else None}
        with translating():
            body = _body(call)
        return post(endpoint(base_url, "/v2", "/chat"), body, own, extra_headers)

    def parser(self, headers: Mapping[str, str] = NO_HEADERS) -> Parser:
        """Return a fresh parser."""
        return CohereParser()

    def refusal(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> UpstreamFailure:
        """Return what an error answer means."""
        return refusal_of(status, headers, body, now)


def _body(call: Call) -> dict[str, Any]:
    params = call.params
    if params.get("n") not in (None, 1):
        raise UntranslatableCall(f"this provider gives one answer, not n={params['n']}")
    body = {name: params[name] for name in _SAME if params.get(name) is not None}
    body |= {theirs: params[ours] for ours, theirs in _RENAMED.items() if params.get(ours) is not None}
    body |= {"model": call.model, "messages": [_message(m) for m in call.messages], "stream": True}
    if stop := params.get("stop"):
        body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    if format_ := params.get("response_format"):
        body["response_format"] = _response_format(format_)
    if tools := params.get("tools"):
        body |= _tools(tools, params.get("tool_choice"))
    return body


def _message(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    translated: dict[str, Any] = {"role": role}
    if message.content:
        translated["content"] = message.content
    elif not message.tool_calls:
        translated["content"] = ""
    if message.tool_calls:
        translated["tool_calls"] = message.tool_calls
    if message.role == "tool":
        translated["tool_call_id"] = message.tool_call_id or ""
    return translated


def _response_format(format_: Any) -> Any:
    if isinstance(format_, dict) and format_.get("type") == "json_schema":
        return {"type": "json_object", "json_schema": (format_.get("json_schema") or {}).get("schema") or {}}
    return format_


def _tools(tools: list[dict[str, Any]], choice: Any) -> dict[str, Any]:
    """Return tools and choice; a single named function is asked for by offering only that one."""
    if choice in (None, "auto"):
        return {"tools": tools}
    if choice in ("required", "none"):
        return {"tools": tools, "tool_choice": choice.upper()}
    if not isinstance(choice, dict):
        raise UntranslatableCall(f"tool_choice {choice!r} is not known: use auto, none, required or a function")
    name = (choice.get("function") or {}).get("name")
    return {"tools": [t for t in tools if (t.get("function") or {}).get("name") == name], "tool_choice": "REQUIRED"}


class CohereParser(EventParser):
    """Understands a v2 chat stream, which ends with ``message-end``; unknown events are passed over."""

    __slots__ = ("_tools",)

    def __init__(self) -> None:
        super().__init__()
        self._tools: dict[int, int] = {}

    def read(self, payload: bytes) -> None:
        """Take one event; its ``type`` is in the data, so the event's name is not needed."""
        event = _event.decode(payload)
        delta = event.delta or _Delta()
        message = delta.message or _Message()
        match event.type:
            case "content-delta" | "content-start" | "tool-plan-delta":
                self._text(message)
            case "tool-call-start" | "tool-call-delta":
                if event.type == "tool-call-start":
                    self._tools[event.index] = len(self._tools)
                if isinstance(message.tool_calls, _ToolCall):
                    self._tool_call(message.tool_calls, self._tools.setdefault(event.index, len(self._tools)))
            case "message-start":
                self.joined.add(Identity(event.id))
            case "message-end":
                self._ending(delta)

    def _text(self, message: _Message) -> None:
        if message.tool_plan:
            self.joined.text(Reasoning, message.tool_plan)
        if isinstance(message.content, _Content):
            if message.content.thinking:
                self.joined.text(Reasoning, message.content.thinking)
            if message.content.text:
                self.joined.text(Text, message.content.text)

    def _tool_call(self, call: _ToolCall, number: int) -> None:
        function = call.function or _Function()
        self.joined.tool_call(
            ToolCall(index=number, id=call.id, name=function.name, arguments=function.arguments or "")
        )

    def _ending(self, delta: _Delta) -> None:
        reason = delta.finish_reason or "COMPLETE"
        failed = reason in _FAILED or bool(delta.error)
        if not failed:
            self.joined.add(Finish(_FINISH.get(reason, reason)))
        usage, reasons = read_usage(delta.usage)
        if usage is not None:
            self.joined.add(UsagePart(usage))
        elif reasons:
            self.joined.add(UsageLeftOut(reasons))
        self.end(failure_in_stream(delta.error or f"the answer ended with {reason}") if failed else End())
