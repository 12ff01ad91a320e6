"""The Cohere v2 chat dialect: request and stream."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from schemas.events import Annotation, ToolCall
from schemas.requests import Message
from services.producer.core.dialects.anthropic_request import is_own_block
from services.producer.core.dialects.failures import failure_in_stream, refusal_of
from services.producer.core.dialects.media import annotation, file_part, text_of
from services.producer.core.dialects.stream import EventParser
from services.producer.core.dialects.tool_calls import ToolCalls
from services.producer.core.dialects.usage import read_usage
from services.producer.core.dialects.whole_answers import chat_events
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
    AnnotationPart,
    End,
    Finish,
    Identity,
    Reasoning,
    Text,
    UpstreamFailure,
    UsageLeftOut,
    UsagePart,
)
from services.producer.ports import UpstreamRequest

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
    type: str = "text"
    text: str | None = None
    thinking: str | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: Any = None


class _ToolCall(msgspec.Struct):
    id: str | None = None
    function: _Function | None = None


class _Message(msgspec.Struct):
    # message-start has empty lists where later events have one object
    content: _Content | list[Any] | None = None
    tool_plan: str | None = None
    tool_calls: _ToolCall | list[Any] | None = None
    citations: Any = None


class _Delta(msgspec.Struct):
    message: _Message | None = None
    finish_reason: str | None = None
    usage: Any = None
    error: Any = None


class _Event(msgspec.Struct):
    type: str = ""
    index: Any = 0
    id: str | None = None
    delta: _Delta | None = None
    error: Any = None


_event: Final = msgspec.json.Decoder(_Event)


class Cohere:
    """The v2 chat API."""

    def request(
        self, call: UpstreamRequest, base_url: str, key: str | None, extra_headers: Mapping[str, str]
    ) -> HttpCall:
        """Return the POST to ``/v2/chat``."""
        own = {"authorization": f"Bearer {key}" if key else None}
        with translating():
            body = _body(call)
        return post(endpoint(base_url, "/v2", "/chat"), body, own, extra_headers)

    def parser(self, headers: Mapping[str, str] = NO_HEADERS) -> Parser:
        """Return a fresh parser."""
        return CohereParser()

    def refusal(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> UpstreamFailure:
        """Return the failure of an error response."""
        return refusal_of(status, headers, body, now)


def _body(call: UpstreamRequest) -> dict[str, Any]:
    params = call.params
    if params.get("n") not in (None, 1):
        raise UntranslatableCall(f"this provider supports only n=1, not n={params['n']}")
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
    if content := _content(message.content) or message.refusal:
        translated["content"] = content
    elif not message.tool_calls:
        translated["content"] = ""
    if message.tool_calls:
        # signatures belong to other providers
        known = ("id", "type", "function")
        translated["tool_calls"] = [{n: call[n] for n in known if n in call} for call in message.tool_calls]
    if message.tool_plan:
        translated["tool_plan"] = message.tool_plan
    if message.role == "tool":
        translated["tool_call_id"] = message.tool_call_id or ""
    return translated


def _content(content: str | list[dict[str, Any]] | None) -> str | list[dict[str, Any]] | None:
    """Return content without parts that only other providers can read: signatures and encrypted thoughts."""
    if not isinstance(content, list):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        match part.get("type"):
            case "thinking":
                if thinking := text_of(part.get("thinking")):
                    parts.append({"type": "thinking", "thinking": thinking})
            case kind if is_own_block(kind):
                pass
            case "refusal":
                parts.append({"type": "text", "text": text_of(part.get("refusal"))})
            case _:
                parts.append(part)
    return parts


def _response_format(format_: Any) -> Any:
    if isinstance(format_, dict) and format_.get("type") == "json_schema":
        return {"type": "json_object", "json_schema": (format_.get("json_schema") or {}).get("schema") or {}}
    return format_


def _tools(tools: list[dict[str, Any]], choice: Any) -> dict[str, Any]:
    """Return tools and tool choice; a single required function is expressed by offering only that one."""
    if choice in (None, "auto"):
        return {"tools": tools}
    if choice in ("required", "none"):
        return {"tools": tools, "tool_choice": choice.upper()}
    if not isinstance(choice, dict):
        raise UntranslatableCall(f"tool_choice {choice!r} is unknown: use auto, none, required or a function")
    name = (choice.get("function") or {}).get("name")
    return {"tools": [t for t in tools if (t.get("function") or {}).get("name") == name], "tool_choice": "REQUIRED"}


class CohereParser(EventParser[_Event]):
    """Parse a v2 chat stream, which ends with ``message-end``."""

    __slots__ = ("_calls",)
    event_type = _Event

    def __init__(self) -> None:
        super().__init__(_event)
        self._calls = ToolCalls()

    def whole(self, tree: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a chat answer as the events of a stream."""
        return chat_events(tree)

    def read(self, event: _Event, payload: bytes) -> None:
        """Handle one event; its ``type`` is in the data, so the event's name is not needed."""
        if event.error:
            self.unknown(payload)
            return
        delta = event.delta or _Delta()
        message = delta.message or _Message()
        match event.type:
            case "content-delta" | "content-start" | "tool-plan-delta":
                self._text(message, payload)
            case "tool-call-start" | "tool-call-delta":
                if isinstance(message.tool_calls, _ToolCall):
                    self._tool_call(message.tool_calls, event.index)
            case "tool-call-end":
                self._fragments(self._calls.end(0, event.index))
            case "citation-start":
                citations = message.citations
                for citation in citations if isinstance(citations, list) else [citations]:
                    if citation:
                        self.joined.add(AnnotationPart(_annotation(citation)))
            case "message-start":
                self.joined.add(Identity(event.id))
            case "message-end":
                self._ending(delta)
            case "content-end" | "tool-call-end" | "citation-start" | "citation-end" | "debug":
                pass
            case _:
                self.unknown(payload)

    def _text(self, message: _Message, payload: bytes) -> None:
        if message.tool_plan:
            self.joined.text(Reasoning, message.tool_plan)
        content = message.content
        if not isinstance(content, _Content):
            return
        if content.thinking:
            self.joined.text(Reasoning, content.thinking)
        if content.text:
            self.joined.text(Text, content.text)
        if content.type not in ("text", "thinking"):
            whole = msgspec.json.decode(payload)["delta"]["message"]["content"]
            self.joined.add(file_part(content.type, whole))

    def _tool_call(self, call: _ToolCall, index: Any) -> None:
        function = call.function or _Function()
        self._fragments(self._calls.take(0, index, call.id, function.name, function.arguments))

    def _fragments(self, fragments: list[ToolCall]) -> None:
        for fragment in fragments:
            self.joined.tool_call(fragment)

    def _ending(self, delta: _Delta) -> None:
        reason = delta.finish_reason or ""
        failed = reason.upper() in _FAILED or bool(delta.error)
        if reason and not failed:
            finish = _FINISH.get(reason, reason)
            if finish not in ("length", "content_filter"):
                self._fragments(self._calls.end_all(0))
            self.joined.add(Finish(finish))
        usage, reasons = read_usage(delta.usage)
        if usage is not None:
            self.joined.add(UsagePart(usage))
        elif reasons:
            self.joined.add(UsageLeftOut(reasons))
        ended = {"message": f"the answer ended with {reason}", "code": reason}
        self.end(failure_in_stream(delta.error or ended) if failed else End())


def _annotation(citation: Any) -> Annotation:
    """Return a citation: a range of characters of the answer, and the first of its sources."""
    cited = annotation(citation)
    sources = citation.get("sources") if isinstance(citation, dict) else None
    first = next((source for source in sources or () if isinstance(source, dict)), {})
    source = annotation(first.get("document") or first.get("tool_output") or {})
    if isinstance(citation, dict) and citation.get("type") == "PLAN":  # of the plan, which is reasoning
        cited = msgspec.structs.replace(cited, start=None, end=None)
    return msgspec.structs.replace(cited, url=source.url, title=source.title)
