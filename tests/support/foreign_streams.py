"""Bodies of servers that deviate from their dialect, and their parsed outcome under every chunking."""

import json
from collections.abc import Iterable
from typing import Any

from services.producer.core.dialects import dialect_of
from services.producer.core.dialects.wire import Parser
from services.producer.core.parts import (
    End,
    Finish,
    NoticePart,
    Part,
    Reasoning,
    Text,
    ToolCallPart,
    UpstreamFailure,
    UsagePart,
)

DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


def data(value: Any, name: str = "") -> bytes:
    """Return one server-sent event; bytes are taken as they are."""
    payload = value if isinstance(value, bytes) else json.dumps(value).encode()
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + payload + b"\n\n"


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    """Return a chat completion chunk."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1764870123, "model": "m", "choices": [choice]}


def stream(*events: Any, done: bool = True) -> bytes:
    """Return events of an OpenAI-compatible stream, with its end marker."""
    return b"".join(map(data, events)) + (DONE if done else b"")


def usage_chunk(**usage: Any) -> dict[str, Any]:
    """Return the chunk that carries usage."""
    return {"id": "c1", "object": "chat.completion.chunk", "choices": [], "usage": usage or USAGE}


HELLO = chunk(content="Hello")
STOP = chunk("stop")

MESSAGE_START = {
    "type": "message_start",
    "message": {"id": "msg_1", "type": "message", "model": "m", "content": [], "usage": {"input_tokens": 15}},
}
TEXT_START = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
TEXT_STOP = {"type": "content_block_stop", "index": 0}
MESSAGE_END = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}}


def text_delta(text: str) -> dict[str, Any]:
    """Return an Anthropic text delta."""
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}


def named(*events: dict[str, Any]) -> bytes:
    """Return events whose name is their type, as Anthropic and Cohere send them."""
    return b"".join(data(event, event["type"]) for event in events)


COHERE_START = {"type": "message-start", "id": "c-1", "delta": {"message": {"role": "assistant", "content": []}}}
COHERE_END = {
    "type": "message-end",
    "delta": {"finish_reason": "COMPLETE", "usage": {"tokens": {"input_tokens": 7, "output_tokens": 5}}},
}


def cohere_delta(text: str) -> dict[str, Any]:
    """Return a Cohere text delta."""
    return {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": text}}}}


class Outcome:
    """The outcome of a parsed body."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.text = "".join(part.text for part in parts if isinstance(part, Text))
        self.reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
        self.arguments = "".join(part.tool_call.arguments for part in parts if isinstance(part, ToolCallPart))
        self.names = [part.tool_call.name for part in parts if isinstance(part, ToolCallPart) if part.tool_call.name]
        self.finish = [part.reason for part in parts if isinstance(part, Finish)]
        self.usage = next((part.usage for part in reversed(parts) if isinstance(part, UsagePart)), None)
        self.notices = [part for part in parts if isinstance(part, NoticePart)]
        last = parts[-1] if parts else None
        self.failure = last if isinstance(last, UpstreamFailure) else None
        self.completed = isinstance(last, End)
        self.code = "completed" if self.completed else self.failure.code if self.failure else ""

    def __repr__(self) -> str:
        return f"{self.code} {self.text!r} {self.failure} {self.notices}"

    def told(self) -> tuple[object, ...]:
        """Return the parts of the outcome that must not depend on the chunking."""
        usage = self.usage
        return self.code, self.failure, self.text, self.reasoning, self.arguments, self.names, self.finish, usage


def parser_of(dialect: str) -> Parser:
    """Return a fresh parser."""
    return dialect_of(dialect).parser({})  # type: ignore[arg-type]  # names of dialects


def outcome(dialect: str, body: bytes, broken: str = "") -> Outcome:
    """Return the outcome of ``body``, which must be the same under every chunking."""
    whole = _read(dialect, [body], broken)
    cuts: Iterable[list[bytes]] = [[body[at : at + 1] for at in range(len(body))]]
    step = max(1, len(body) // 200)
    for chunks in [*cuts, *([body[:at], body[at:]] for at in range(1, len(body), step))]:
        assert _read(dialect, chunks, broken).told() == whole.told(), chunks
    return whole


def _read(dialect: str, chunks: list[bytes], broken: str) -> Outcome:
    parser = parser_of(dialect)
    parts = [part for part_of_body in chunks for part in parser.feed(part_of_body)]
    return Outcome([*parts, *parser.finish(broken)])
