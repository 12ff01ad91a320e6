"""OpenAI chat completions, and every server that speaks them."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

import msgspec

from schemas.requests import Message
from schemas.usage import Usage
from services.producer.core.bounds import choice_of
from services.producer.core.dialects.anthropic_request import is_own_block
from services.producer.core.dialects.failures import failure_in_stream, refusal_of
from services.producer.core.dialects.leniency import loads, object_in
from services.producer.core.dialects.media import text_of
from services.producer.core.dialects.openai_content import REASONING, OtherContent, is_thought, thought_signature
from services.producer.core.dialects.reported import reported
from services.producer.core.dialects.stream import FAILED_REASONS, EventParser
from services.producer.core.dialects.tool_calls import ToolCalls
from services.producer.core.dialects.whole_answers import chunks_of
from services.producer.core.dialects.wire import NO_HEADERS, HttpCall, Parser, post
from services.producer.core.parts import (
    End,
    Finish,
    Identity,
    Reasoning,
    Refusal,
    Text,
    UpstreamFailure,
    UsagePart,
)
from services.producer.ports import Call

__all__ = ["OpenAI", "OpenAIParser", "chat_body", "exact_cost"]

_RESERVED: Final = frozenset({"model", "messages", "stream", "stream_options"})
_FINISH: Final = {"function_call": "tool_calls"}
_PLAIN: Final = frozenset({"content", "role"})
_CALLS_ALONE: Final = ["tool_calls"]
_CUT: Final = frozenset({"length", "content_filter", "error"})
"""Finish reasons behind which a tool call without arguments may have had some."""


class _Choice(msgspec.Struct, gc=False):  # a tree from JSON has no cycles for a collector to find
    index: Any = 0
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None


class _InputDetails(msgspec.Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _InputDetails | None = None
    completion_tokens_details: _OutputDetails | None = None
    cost: Decimal | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    base_resp: Any = None
    created: float | None = None
    id: str | None = None
    model: str | None = None
    usage: _Usage | None = None
    error: Any = None
    citations: Any = None
    search_results: Any = None


_chunk: Final = msgspec.json.Decoder(_Chunk)


class OpenAI:
    """The chat completions API. ``include_usage`` asks for the usage frame; some servers refuse the option."""

    def __init__(self, include_usage: bool = True) -> None:
        self._include_usage = include_usage

    def request(self, call: Call, base_url: str, key: str | None, extra_headers: Mapping[str, str]) -> HttpCall:
        """Return the POST to ``/chat/completions``; parameters go through unchanged."""
        own = {"authorization": f"Bearer {key}" if key else None}
        return post(
            f"{base_url.rstrip('/')}/chat/completions", chat_body(call, self._include_usage), own, extra_headers
        )

    def parser(self, headers: Mapping[str, str] = NO_HEADERS) -> Parser:
        """Return a fresh parser."""
        return OpenAIParser()

    def refusal(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> UpstreamFailure:
        """Return what an error answer means."""
        return refusal_of(status, headers, body, now)


def chat_body(call: Call, include_usage: bool) -> dict[str, Any]:
    """Return the body of a streamed chat completion. Parameters cannot override what Tailrace decides itself."""
    body = {name: value for name, value in call.params.items() if name not in _RESERVED}
    body |= {"model": call.model, "messages": [_message(m) for m in call.messages], "stream": True}
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    return body


def _message(message: Message) -> Message:
    """Return a message without the parts that only Anthropic can read: thoughts with their proof, its own tools."""
    content = message.content
    if not isinstance(content, list) or not any(_foreign(part) for part in content):
        return message
    return msgspec.structs.replace(message, content=[part for part in content if not _foreign(part)] or None)


def _foreign(part: dict[str, Any]) -> bool:
    # Mistral's thoughts are lists
    return (part.get("type") == "thinking" and isinstance(part.get("thinking"), str)) or is_own_block(part.get("type"))


class OpenAIParser(EventParser[_Chunk]):
    """Understands a stream of chat completion chunks, which ends with ``[DONE]``.

    ``upstream_id``: the answer's name where a response header gives it; otherwise the chunks do.
    """

    __slots__ = ("_calls", "_currency", "_identified", "_other", "_upstream_id")
    event_type = _Chunk
    done_is_marker = True

    def __init__(self, upstream_id: str | None = None, currency: str | None = None) -> None:
        super().__init__(_chunk)
        self._upstream_id = upstream_id
        self._currency = currency
        self._identified = False
        self._calls = ToolCalls()
        self._other = OtherContent(self.joined)

    def end(self, part: End | UpstreamFailure) -> None:
        """Add the last part, behind the ends of tool calls whose choice had no end of its own."""
        if isinstance(part, End):
            for choice in self._calls.choices:
                self._end_calls(choice)
        super().end(part)

    def whole(self, tree: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a chat completion as a chunk."""
        return chunks_of(tree, self.joined.begun)

    def read(self, chunk: _Chunk, payload: bytes) -> None:
        """Take one chunk."""
        choices = chunk.choices
        if choices and choices[0].delta is None and self._take_whole(payload):
            return
        if not self._identified and (chunk.id or chunk.model):
            self._identified = True
            self.joined.add(Identity(self._upstream_id or chunk.id or None, chunk.model or None))
        failed = ""
        for choice in choices or ():
            index = choice_of(choice.index)
            if choice.delta is not None:
                self._delta(choice.delta, index, chunk.created)
            # some servers repeat the reason on their usage chunk
            if choice.finish_reason and not chunk.error and index not in self.joined.finished:
                if choice.finish_reason.lower() in FAILED_REASONS:
                    failed = choice.finish_reason
                else:
                    self._finish(_FINISH.get(choice.finish_reason, choice.finish_reason), index)
        if chunk.search_results or chunk.citations:
            self._other.sources("search_results", chunk.search_results or [])
            self._other.sources("citations", chunk.citations or [])
        if chunk.usage is not None:
            self.joined.add(UsagePart(self._usage(chunk.usage, payload)))
        if chunk.error or failed or chunk.base_resp or not (choices or chunk.usage):
            self._beside_content(payload, failed)

    def _beside_content(self, payload: bytes, failed: str) -> None:
        """Take what a chunk says apart from its choices. ``failed``: a finish reason that means a failure."""
        tree = loads(payload)
        known = bool(tree.get("choices") or tree.get("usage"))
        if not known and "choices" not in tree and tree.get("object") != "chat.completion.chunk":
            self.unknown(payload)
        elif reported(tree, known) is not None:
            self.end(failure_in_stream(tree))
        elif failed:
            choices = tree["choices"] if isinstance(tree.get("choices"), list) else [tree.get("choices")]
            told = [choice["error"] for choice in choices if isinstance(choice, dict) and choice.get("error")]
            self.end(failure_in_stream(told or {"message": f"the answer ended with {failed!r}", "code": failed}))

    def _delta(self, delta: dict[str, Any], choice: int, at: float | None) -> None:
        content = delta.get("content")
        if len(delta) > 1 or content.__class__ is not str:
            fields = [name for name, value in delta.items() if value and name not in _PLAIN]
            if fields == _CALLS_ALONE and not content:
                self._tool_calls(delta["tool_calls"], choice, at)
                return
            if fields or (content.__class__ is not str and content is not None):
                self._rich(delta, content, choice, at)
                return
        if content:
            self.joined.text(Text, content, choice, at)

    def _rich(self, delta: dict[str, Any], content: Any, choice: int, at: float | None) -> None:
        """Take a delta that holds more than text, or anything else."""
        for name in REASONING:
            if reasoning := text_of(delta.get(name)):
                self.joined.text(Reasoning, reasoning, choice, at)
                break
        if isinstance(content, str):
            if content:
                kind = Reasoning if is_thought(delta.get("extra_content")) else Text
                self.joined.text(kind, content, choice, at)
        elif isinstance(content, list | dict):
            self._other.parts(content, choice, at)
        elif content is not None:
            got = type(content).__name__
            raise ValueError(f"Expected `str | array | null`, got `{got}` - at `$.choices[{choice}].delta.content`")
        if refusal := text_of(delta.get("refusal")):
            self.joined.text(Refusal, refusal, choice, at)
        self._other.delta(delta, choice, at)
        self._tool_calls(delta.get("tool_calls"), choice, at)
        if isinstance(function := delta.get("function_call"), dict):
            self._call({"function": function}, choice, at)

    def _tool_calls(self, calls: Any, choice: int, at: float | None) -> None:
        beside = False
        for call in calls if isinstance(calls, list) else [calls] if calls else ():
            self._call(call, choice, at, beside=beside)
            beside = True

    def _call(self, call: Any, choice: int, at: float | None, *, beside: bool = False) -> None:
        if not isinstance(call, dict):
            self._other.keep("tool_calls", call, choice, at)
            return
        function = call.get("function")
        if not isinstance(function, dict):
            # a tool that the provider runs itself, or one of another type than function
            if call.get("type") not in (None, "function"):
                self._other.keep(str(call["type"]), call, choice, at)
                return
            function = call
        extra = call.get("extra_content")
        fragments = self._calls.take(
            choice,
            call.get("index"),
            call.get("id"),
            function.get("name"),
            function.get("arguments"),
            beside=beside,
            signature=thought_signature(extra) if extra else None,
        )
        for fragment in fragments:
            self.joined.tool_call(fragment, choice, at)
        if extra and not thought_signature(extra):
            self._other.keep("extra_content", extra, choice, at)

    def _finish(self, reason: str, choice: int) -> None:
        if reason in _CUT:
            self._calls.abandon(choice)
        else:
            self._end_calls(choice)
        self.joined.add(Finish(reason, choice))

    def _end_calls(self, choice: int) -> None:
        for fragment in self._calls.end_all(choice):
            self.joined.tool_call(fragment, choice)

    def _usage(self, usage: _Usage, payload: bytes) -> Usage:
        inputs = usage.prompt_tokens_details or _InputDetails()
        outputs = usage.completion_tokens_details or _OutputDetails()
        cost = exact_cost(usage.cost) if self._currency else None
        return Usage(
            input=usage.prompt_tokens or 0,
            output=usage.completion_tokens or 0,
            cached_input=inputs.cached_tokens or 0,
            cache_write=inputs.cache_write_tokens or 0,
            reasoning=outputs.reasoning_tokens or 0,
            cost=cost,
            currency=self._currency if cost is not None else None,
            raw=object_in(payload, "usage"),
        )


def exact_cost(cost: Decimal | None) -> str | None:
    """Return a cost as exact decimal text; ``None`` for what is none."""
    # An absurd exponent would be written out in full, so it is no cost.
    if cost is None or not cost.is_finite() or abs(cost.adjusted()) > 30:
        return None
    return f"{cost:f}"
