"""The dialect of OpenAI chat completions, which many other servers implement."""

from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from typing import Any, Final

import msgspec

from schemas.requests import Message
from schemas.usage import Usage, grown
from services.producer.core.bounds import choice_of
from services.producer.core.dialects.anthropic_request import is_own_block
from services.producer.core.dialects.failures import failure_in_stream, refusal_of
from services.producer.core.dialects.leniency import loads
from services.producer.core.dialects.media import text_of
from services.producer.core.dialects.openai_content import REASONING, OtherContent, is_thought, thought_signature
from services.producer.core.dialects.reported import reported
from services.producer.core.dialects.stream import FAILED_REASONS, EventParser
from services.producer.core.dialects.tool_calls import ToolCalls
from services.producer.core.dialects.usage import STANDARD, UsageRules, read_usage, together
from services.producer.core.dialects.whole_answers import chunks_of
from services.producer.core.dialects.wire import NO_HEADERS, HttpCall, Parser, post
from services.producer.core.parts import (
    End,
    Finish,
    Identity,
    Part,
    Reasoning,
    Refusal,
    Text,
    UpstreamFailure,
    UsageLeftOut,
    UsagePart,
)
from services.producer.ports import UpstreamRequest

__all__ = ["OpenAI", "OpenAIParser", "chat_body"]

_RESERVED: Final = frozenset({"model", "messages", "stream", "stream_options"})
_FINISH: Final = {"function_call": "tool_calls"}
_PLAIN: Final = frozenset({"content", "role"})
_CALLS_ALONE: Final = ["tool_calls"]
_CUT: Final = frozenset({"length", "content_filter", "error"})
"""Finish reasons after which a tool call without arguments may be incomplete."""


class _Choice(msgspec.Struct, gc=False):  # a tree from JSON has no cycles for a collector to find
    index: Any = 0
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None
    usage: Any = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    base_resp: Any = None
    created: float | None = None
    id: str | None = None
    model: str | None = None
    usage: Any = None
    x_groq: Any = None
    timings: Any = None
    prompt_eval_count: Any = None
    eval_count: Any = None
    error: Any = None
    citations: Any = None
    search_results: Any = None


_chunk: Final = msgspec.json.Decoder(_Chunk)
_exact: Final = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal)
_MOST_CHOICES: Final = 128
"""Bound of the choices with separate usage."""


class OpenAI:
    """The chat completions API. ``include_usage`` requests the usage frame; some servers reject the option.

    ``rules``: how the provider counts.
    """

    def __init__(self, include_usage: bool = True, rules: UsageRules = STANDARD) -> None:
        self._include_usage = include_usage
        self._rules = rules

    def request(
        self, call: UpstreamRequest, base_url: str, key: str | None, extra_headers: Mapping[str, str]
    ) -> HttpCall:
        """Return the POST to ``/chat/completions``; parameters are passed unchanged."""
        own = {"authorization": f"Bearer {key}" if key else None}
        return post(
            f"{base_url.rstrip('/')}/chat/completions", chat_body(call, self._include_usage), own, extra_headers
        )

    def parser(self, headers: Mapping[str, str] = NO_HEADERS) -> Parser:
        """Return a fresh parser."""
        return OpenAIParser(rules=self._rules)

    def refusal(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> UpstreamFailure:
        """Return the failure of an error response."""
        return refusal_of(status, headers, body, now)


def chat_body(call: UpstreamRequest, include_usage: bool) -> dict[str, Any]:
    """Return the body of a streamed chat completion. Parameters cannot override fields that Tailrace sets itself."""
    body = {name: value for name, value in call.params.items() if name not in _RESERVED}
    body |= {"model": call.model, "messages": [_message(m) for m in call.messages], "stream": True}
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    return body


def _message(message: Message) -> Message:
    """Return a message without the parts that only Anthropic can read: signed thoughts, and its own tools."""
    content = message.content
    if not isinstance(content, list) or not any(_foreign(part) for part in content):
        return message
    return msgspec.structs.replace(message, content=[part for part in content if not _foreign(part)] or None)


def _foreign(part: dict[str, Any]) -> bool:
    # Mistral's thoughts are lists
    return (part.get("type") == "thinking" and isinstance(part.get("thinking"), str)) or is_own_block(part.get("type"))


class OpenAIParser(EventParser[_Chunk]):
    """Parse a stream of chat completion chunks, which ends with ``[DONE]``.

    ``upstream_id``: the answer's identifier from a response header, else from the chunks. Usage is in the chunk, in a
    choice, in ``x_groq`` (Groq), or in counts of llama.cpp or Ollama; some servers send it with every chunk.
    """

    __slots__ = ("_by_choice", "_calls", "_identified", "_newest", "_other", "_rules", "_upstream_id")
    event_type = _Chunk
    done_is_marker = True

    def __init__(self, upstream_id: str | None = None, rules: UsageRules = STANDARD) -> None:
        super().__init__(_chunk)
        self._upstream_id = upstream_id
        self._rules = rules
        self._newest: tuple[Any, bytes] | None = None
        self._by_choice: dict[int, Usage] = {}
        self._identified = False
        self._calls = ToolCalls()
        self._other = OtherContent(self.joined)

    def feed(self, data: bytes) -> list[Part]:
        """Return the parts that ``data`` completes, adjacent fragments of one kind joined, and usage once."""
        parts = super().feed(data)
        if self._newest is not None:
            self._report()
            parts += self.joined.take()
        return parts

    def end(self, part: End | UpstreamFailure) -> None:
        """Add usage, the ends of tool calls in unfinished choices, and then the last part."""
        if isinstance(part, End):
            for choice in self._calls.choices:
                self._end_calls(choice)
        self._report()
        super().end(part)

    def _end_with_body(self, broken: str) -> None:
        self._report()
        super()._end_with_body(broken)

    def whole(self, tree: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a chat completion as a chunk."""
        return chunks_of(tree, self.joined.begun)

    def read(self, chunk: _Chunk, payload: bytes) -> None:
        """Handle one chunk."""
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
            if choice.usage is not None:
                self._report_choice(choice.usage, index)
        if chunk.search_results or chunk.citations:
            self._other.sources("search_results", chunk.search_results or [])
            self._other.sources("citations", chunk.citations or [])
        has_usage = self._find_usage(chunk, payload)
        if chunk.error or failed or chunk.base_resp or not (choices or has_usage):
            self._read_chunk_fields(payload, failed)

    def _read_chunk_fields(self, payload: bytes, failed: str) -> None:
        """Handle the fields of a chunk other than its choices. ``failed``: a finish reason that means a failure."""
        tree = loads(payload)
        known = bool(tree.get("choices") or tree.get("usage"))
        if not known and "choices" not in tree and tree.get("object") != "chat.completion.chunk":
            self.unknown(payload)
        elif reported(tree, known) is not None:
            self.end(failure_in_stream(tree))
        elif failed:
            choices = tree["choices"] if isinstance(tree.get("choices"), list) else [tree.get("choices")]
            errors = [choice["error"] for choice in choices if isinstance(choice, dict) and choice.get("error")]
            self.end(failure_in_stream(errors or {"message": f"the answer ended with {failed!r}", "code": failed}))

    def _delta(self, delta: dict[str, Any], choice: int, at: float | None) -> None:
        content = delta.get("content")
        if len(delta) > 1 or content.__class__ is not str:
            fields = [name for name, value in delta.items() if value and name not in _PLAIN]
            if fields == _CALLS_ALONE and not content:
                self._tool_calls(delta["tool_calls"], choice, at)
                return
            if fields or (content.__class__ is not str and content is not None):
                self._read_delta(delta, content, choice, at)
                return
        if content:
            self.joined.text(Text, content, choice, at)

    def _read_delta(self, delta: dict[str, Any], content: Any, choice: int, at: float | None) -> None:
        """Handle a delta that contains more than text."""
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
            if function is not None:
                self._other.keep("tool_calls", call, choice, at)
                return
            function = call
        elif not isinstance(function.get("name"), str | None) and function.get("arguments") is None:
            self._other.keep("tool_calls", call, choice, at)
            return
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

    def _find_usage(self, chunk: _Chunk, payload: bytes) -> bool:
        """Keep the report of a chunk for the end of the read; return whether it has one."""
        raw: Any = chunk.usage
        if raw is None and isinstance(chunk.x_groq, dict):
            raw = chunk.x_groq.get("usage")
        if raw is None and chunk.timings is not None:
            raw = chunk.timings
        if raw is None and chunk.eval_count is not None:
            raw = {"prompt_eval_count": chunk.prompt_eval_count, "eval_count": chunk.eval_count}
        if raw is None:
            return False
        if self._newest is not None and not _continues(self._newest[0], raw):
            self._report()
        self._newest = raw, payload
        return True

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


def _continues(earlier: Any, later: Any) -> bool:
    """Return whether a report continues the counts of an earlier one, and so replaces it."""
    if not (isinstance(earlier, dict) and isinstance(later, dict) and len(earlier) <= len(later)):
        return False
    before, after = ((r.get("prompt_tokens"), r.get("completion_tokens")) for r in (earlier, later))
    return all(type(a) is int and type(b) is int and a <= b for a, b in zip(before, after, strict=True))
