"""OpenAI chat completions, and every server that speaks them."""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Final

import msgspec

from schemas.events import ToolCall
from schemas.usage import Usage
from services.producer.core.dialects.failures import failure_in_stream, refusal_of
from services.producer.core.dialects.leniency import loads, object_in
from services.producer.core.dialects.reported import reported
from services.producer.core.dialects.stream import FAILED_REASONS, EventParser
from services.producer.core.dialects.whole_answers import chunks_of
from services.producer.core.dialects.wire import NO_HEADERS, HttpCall, Parser, post
from services.producer.core.parts import (
    Finish,
    Identity,
    Reasoning,
    Text,
    UpstreamFailure,
    UsagePart,
)
from services.producer.ports import Call

__all__ = ["OpenAI", "OpenAIParser", "chat_body", "exact_cost"]

_RESERVED: Final = frozenset({"model", "messages", "stream", "stream_options"})
_FINISH: Final = {"function_call": "tool_calls"}


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _ContentPart(msgspec.Struct):
    """A part of content given as a list, as Mistral does; its thinking is a list of parts again."""

    type: str = "text"
    text: str | None = None
    thinking: "str | list[_ContentPart] | None" = None


class _Delta(msgspec.Struct, gc=False):  # a tree from JSON has no cycles for a collector to find
    content: str | list[_ContentPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    delta: _Delta | None = None
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
    body |= {"model": call.model, "messages": call.messages, "stream": True}
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    return body


class OpenAIParser(EventParser[_Chunk]):
    """Understands a stream of chat completion chunks, which ends with ``[DONE]``.

    ``upstream_id``: the answer's name where a response header gives it; otherwise the chunks do.
    """

    __slots__ = ("_currency", "_identified", "_upstream_id")
    event_type = _Chunk
    done_is_marker = True

    def __init__(self, upstream_id: str | None = None, currency: str | None = None) -> None:
        super().__init__(_chunk)
        self._upstream_id = upstream_id
        self._currency = currency
        self._identified = False

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
            if choice.delta is not None:
                self._delta(choice.delta, choice.index, chunk.created)
            # some servers repeat the reason on their usage chunk
            if choice.finish_reason and not chunk.error and choice.index not in self.joined.finished:
                if choice.finish_reason.lower() in FAILED_REASONS:
                    failed = choice.finish_reason
                else:
                    self.joined.add(Finish(_FINISH.get(choice.finish_reason, choice.finish_reason), choice.index))
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

    def _delta(self, delta: _Delta, choice: int, at: float | None) -> None:
        joined = self.joined
        if reasoning := delta.reasoning_content or delta.reasoning:
            joined.text(Reasoning, reasoning, choice, at)
        if isinstance(delta.content, str):
            if delta.content:
                joined.text(Text, delta.content, choice, at)
        else:
            self._parts(delta.content or (), choice, at)
        if delta.refusal:
            joined.text(Text, delta.refusal, choice, at)
        for position, call in enumerate(delta.tool_calls or ()):
            function = call.function or _Function()
            joined.tool_call(
                ToolCall(
                    index=position if call.index is None else call.index,
                    id=call.id or None,
                    name=function.name or None,
                    arguments=function.arguments or "",
                ),
                choice,
                at,
            )

    def _parts(self, parts: Iterable[_ContentPart], choice: int, at: float | None) -> None:
        for part in parts:
            if part.thinking:
                self.joined.text(Reasoning, _thought(part.thinking), choice, at)
            if part.text:
                self.joined.text(Text, part.text, choice, at)

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


def _thought(thinking: str | list[_ContentPart]) -> str:
    return thinking if isinstance(thinking, str) else "".join(part.text or "" for part in thinking)


def exact_cost(cost: Decimal | None) -> str | None:
    """Return a cost as exact decimal text; ``None`` for what is none."""
    # An absurd exponent would be written out in full, so it is no cost.
    if cost is None or not cost.is_finite() or abs(cost.adjusted()) > 30:
        return None
    return f"{cost:f}"
