"""OpenAI chat completions, and every server that speaks them."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from decimal import Decimal
from typing import Any, Final

import msgspec

from schemas.events import ToolCall
from schemas.usage import Usage, grown
from services.producer.core.dialects.failures import failure_in_stream, refusal_of
from services.producer.core.dialects.stream import EventParser
from services.producer.core.dialects.usage import STANDARD, UsageRules, read_usage, together
from services.producer.core.dialects.wire import NO_HEADERS, HttpCall, Parser, post
from services.producer.core.parts import (
    End,
    Finish,
    Identity,
    Part,
    Reasoning,
    Text,
    UpstreamFailure,
    UsageLeftOut,
    UsagePart,
)
from services.producer.ports import Call

__all__ = ["OpenAI", "OpenAIParser", "chat_body"]

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
    usage: Any = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    created: float | None = None
    id: str | None = None
    model: str | None = None
    usage: Any = None
    x_groq: Any = None
    timings: Any = None
    prompt_eval_count: Any = None
    eval_count: Any = None
    error: Any = None


_chunk: Final = msgspec.json.Decoder(_Chunk)
_exact: Final = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal)
_MOST_CHOICES: Final = 128
"""Bound of choices whose usage is kept apart."""


class OpenAI:
    """The chat completions API. ``include_usage`` asks for the usage frame; some servers refuse the option.

    ``rules``: how the provider counts.
    """

    def __init__(self, include_usage: bool = True, rules: UsageRules = STANDARD) -> None:
        self._include_usage = include_usage
        self._rules = rules

    def request(self, call: Call, base_url: str, key: str | None, extra_headers: Mapping[str, str]) -> HttpCall:
        """Return the POST to ``/chat/completions``; parameters go through unchanged."""
        own = {"authorization": f"Bearer {key}" if key else None}
        return post(
            f"{base_url.rstrip('/')}/chat/completions", chat_body(call, self._include_usage), own, extra_headers
        )

    def parser(self, headers: Mapping[str, str] = NO_HEADERS) -> Parser:
        """Return a fresh parser."""
        return OpenAIParser(rules=self._rules)

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


class OpenAIParser(EventParser):
    """Understands a stream of chat completion chunks, which ends with ``[DONE]``.

    ``upstream_id``: the answer's name where a response header gives it; otherwise the chunks do. Usage is beside the
    choices or in one, in ``x_groq`` (Groq), or as counts of llama.cpp or Ollama; some send it with every chunk.
    """

    __slots__ = ("_by_choice", "_finished", "_identified", "_newest", "_rules", "_upstream_id")

    def __init__(self, upstream_id: str | None = None, rules: UsageRules = STANDARD) -> None:
        super().__init__()
        self._upstream_id = upstream_id
        self._rules = rules
        self._newest: tuple[Any, bytes] | None = None
        self._by_choice: dict[int, Usage] = {}
        self._identified = False
        self._finished: set[int] = set()

    def feed(self, data: bytes) -> list[Part]:
        """Return what ``data`` completes, adjacent fragments of the same kind joined, and usage once."""
        parts = super().feed(data)
        if self._newest is not None:
            self._report()
            parts += self.joined.take()
        return parts

    def end(self, part: End | UpstreamFailure) -> None:
        """Add the last part, after what was reported."""
        self._report()
        super().end(part)

    def read(self, payload: bytes) -> None:
        """Take one chunk, or the end marker."""
        if payload == b"[DONE]":
            self.end(End())
            return
        chunk = _chunk.decode(payload)
        if not self._identified and (chunk.id or chunk.model):
            self._identified = True
            self.joined.add(Identity(self._upstream_id or chunk.id or None, chunk.model or None))
        for choice in chunk.choices or ():
            if choice.delta is not None:
                self._delta(choice.delta, choice.index, chunk.created)
            # some servers repeat the reason on their usage chunk
            if choice.finish_reason and not chunk.error and choice.index not in self._finished:
                self._finished.add(choice.index)
                self.joined.add(Finish(_FINISH.get(choice.finish_reason, choice.finish_reason), choice.index))
            if choice.usage is not None:
                self._report_choice(choice.usage, choice.index)
        self._find_usage(chunk, payload)
        if chunk.error:
            self.end(failure_in_stream(chunk.error))

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

    def _find_usage(self, chunk: _Chunk, payload: bytes) -> None:
        raw: Any = chunk.usage
        if raw is None and isinstance(chunk.x_groq, dict):
            raw = chunk.x_groq.get("usage")
        if raw is None and chunk.timings is not None:
            raw = chunk.timings
        if raw is None and chunk.eval_count is not None:
            raw = {"prompt_eval_count": chunk.prompt_eval_count, "eval_count": chunk.eval_count}
        if raw is None:
            return
        if self._newest is not None and not _goes_on(self._newest[0], raw):
            self._report()
        self._newest = raw, payload

    def _report(self) -> None:
        if self._newest is None:
            return
        (raw, payload), self._newest = self._newest, None
        if self._rules.currency:
            with suppress(ValueError):
                raw = _exact.decode(payload).get("usage") or raw  # a cost is read to its last digit
        usage, reasons = read_usage(raw, self._rules)
        if usage is not None:
            self.joined.add(UsagePart(usage))
        elif reasons:
            self.joined.add(UsageLeftOut(reasons))

    def _report_choice(self, raw: Any, choice: int) -> None:
        usage, reasons = read_usage(raw, self._rules)
        if usage is not None and (choice in self._by_choice or len(self._by_choice) < _MOST_CHOICES):
            known = self._by_choice.get(choice)
            self._by_choice[choice] = usage if known is None else grown(known, usage)
            self.joined.add(UsagePart(together(self._by_choice.values())))
        elif reasons:
            self.joined.add(UsageLeftOut(reasons))


def _thought(thinking: str | list[_ContentPart]) -> str:
    return thinking if isinstance(thinking, str) else "".join(part.text or "" for part in thinking)


def _goes_on(earlier: Any, later: Any) -> bool:
    """Tell whether a report only counts on from an earlier one, which it then makes needless."""
    if not (isinstance(earlier, dict) and isinstance(later, dict) and len(earlier) <= len(later)):
        return False
    before, after = ((r.get("prompt_tokens"), r.get("completion_tokens")) for r in (earlier, later))
    return all(type(a) is int and type(b) is int and a <= b for a, b in zip(before, after, strict=True))
