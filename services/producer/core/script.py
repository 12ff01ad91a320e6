"""The scripted provider: deterministic answers without a model, at a realistic pace.

For the demo, tests and measurements. A script is a sequence of (delay in seconds, parts). It ends with an end marker
like a provider's stream, or without one if a knob requests that.
"""

import math
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec
import toktok

from schemas.events import ToolCall
from schemas.usage import Usage
from services.producer.core.counting import count_input
from services.producer.core.parts import (
    End,
    Finish,
    Identity,
    Part,
    Reasoning,
    Text,
    ToolCallPart,
    UpstreamFailure,
    UsagePart,
)
from services.producer.core.prose import pieces, sentences, topic_of
from services.producer.ports import UpstreamRequest

__all__ = ["ENCODING", "MODELS", "Step", "play", "refusal"]

ENCODING: Final = "o200k_base"
MODELS: Final = (
    "story",
    "json",
    "tools",
    "reasoning",
    "stall",
    "cutoff",
    "error",
    "refuse",
    "no-usage",
    "megabyte",
)
Step = tuple[float, list[Part]]
_TOKENS_PER_SECOND: Final = 40.0
_TOKENS: Final = 300
_FAULT_AFTER: Final = 20
_MEGABYTE: Final = 1_000_000
_SLICE: Final = 256
_MAX_TOKENS: Final = 200_000


class Knobs(msgspec.Struct, frozen=True, kw_only=True):
    """Knobs of a script in ``params``. ``tokens_per_second`` 0: as fast as possible; the others are token counts."""

    tokens_per_second: float = _TOKENS_PER_SECOND
    tokens: int | None = None
    stall_after: int | None = None
    cutoff_after: int | None = None
    error_after: int | None = None

    @classmethod
    def of(cls, call: UpstreamRequest) -> "Knobs":
        """Return the knobs of a call: the model's own, overridden by numeric parameters; others are ignored."""
        own: dict[str, dict[str, Any]] = {
            "megabyte": {"tokens_per_second": 0.0},
            "stall": {"stall_after": _FAULT_AFTER},
            "cutoff": {"cutoff_after": _FAULT_AFTER},
            "error": {"error_after": _FAULT_AFTER},
        }
        values = own.get(call.model, {})
        for name in cls.__struct_fields__:
            value = call.params.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKENS:
                values[name] = float(value) if name == "tokens_per_second" else int(value)
        return cls(**values)


def refusal(call: UpstreamRequest) -> UpstreamFailure | None:
    """Return the failure of a call that the script refuses before the stream, or ``None``."""
    if call.model == "refuse":
        return UpstreamFailure(
            code="upstream_rate_limited",
            message="the scripted provider refuses: too many requests",
            upstream_status=429,
            recoverable=True,
            retry_after=1.0,
        )
    if call.model not in MODELS:
        return UpstreamFailure(
            code="upstream_not_found",
            message=f"scripted model {call.model[:80]!r} is not known: use one of {', '.join(MODELS)}",
            upstream_status=404,
        )
    return None


def play(call: UpstreamRequest) -> Iterator[Step]:
    """Yield the steps of the answer to a call; an infinite delay means that the stream stays silent for ever."""
    knobs = Knobs.of(call)
    seed = zlib.crc32(msgspec.json.encode((call.model, call.messages)))
    rng = random.Random(seed)
    pause = 1 / knobs.tokens_per_second if knobs.tokens_per_second else 0.0
    yield 5 * pause, [Identity(f"scripted-{seed:08x}", call.model)]
    spoken = _answer(call, knobs, random.Random(seed))
    for count, part in enumerate(spoken):
        if count == knobs.cutoff_after:
            return
        if count == knobs.stall_after:
            yield math.inf, []
            return
        if count == knobs.error_after:
            message = "the scripted provider fails here, as requested"
            yield pause, [UpstreamFailure(code="upstream_error", message=message, recoverable=True)]
            return
        yield pause * rng.uniform(0.5, 1.5), [part]
    ending: list[Part] = [Finish("tool_calls" if call.model == "tools" else "stop")]
    if call.model != "no-usage":
        ending.append(UsagePart(_usage(call, spoken)))
    yield 0.0, [*ending, End()]


def _answer(call: UpstreamRequest, knobs: Knobs, rng: random.Random) -> list[Part]:
    topic = topic_of(call.messages)
    match call.model:
        case "json":
            return _texts(_limited(_json(topic, rng), knobs))
        case "tools":
            return _tool_calls(call.params, topic)
        case "reasoning":
            thoughts = f"The question is about {topic}. I should say what it is, why it matters, and end on an image. "
            thinking: list[Part] = [Reasoning(piece) for piece in pieces(thoughts * 3)]
            return thinking + _texts(_story(topic, knobs, rng))
        case "megabyte":
            text = _limited(_long(sentences(topic, rng), _MEGABYTE)[:_MEGABYTE], knobs)
            return [Text(text[at : at + _SLICE]) for at in range(0, len(text), _SLICE)]
        case _:
            return _texts(_story(topic, knobs, rng))


def _story(topic: str, knobs: Knobs, rng: random.Random) -> str:
    tokens = knobs.tokens if knobs.tokens is not None else _TOKENS
    # Prose has about 4.5 characters a token, so this is always enough text to cut from.
    text, _ = toktok.truncate(_long(sentences(topic, rng), tokens * 8 + 64), tokens, ENCODING)
    return str(text)


def _limited(text: str, knobs: Knobs) -> str:
    return text if knobs.tokens is None else str(toktok.truncate(text, knobs.tokens, ENCODING)[0])


def _long(parts: Iterable[str], characters: int) -> str:
    collected: list[str] = []
    length = 0
    for part in parts:
        if length >= characters:
            break
        collected.append(part)
        length += len(part)
    return "".join(collected)


def _texts(text: str) -> list[Part]:
    return [Text(piece) for piece in pieces(text)]


def _json(topic: str, rng: random.Random) -> str:
    facts = [sentence.strip() for sentence, _ in zip(sentences(topic, rng), range(5), strict=False)]
    answer = {"topic": topic, "facts": facts, "confidence": round(rng.uniform(0.5, 1.0), 2), "sources": []}
    return msgspec.json.format(msgspec.json.encode(answer), indent=2).decode()


def _tool_calls(params: dict[str, Any], topic: str) -> list[Part]:
    """Return two calls, in fragments, of the offered tools or of a search if none is offered."""
    names = [(tool.get("function") or {}).get("name") for tool in params.get("tools") or () if isinstance(tool, dict)]
    offered = [name for name in names if isinstance(name, str)] or ["search"]
    parts: list[Part] = []
    for index, aspect in enumerate(("history", "today")):
        name = offered[index % len(offered)]
        parts.append(ToolCallPart(ToolCall(index=index, id=f"call_scripted_{index}", name=name)))
        arguments = msgspec.json.encode({"query": f"{topic} {aspect}", "limit": 3}).decode()
        parts += [ToolCallPart(ToolCall(index=index, arguments=p)) for p in re.findall(r"\W*\w+|\W+$", arguments)]
    return parts


def _usage(call: UpstreamRequest, spoken: list[Part]) -> Usage:
    """Return the exact count of all texts; each tool call counts its name and arguments as one text."""
    text = "".join(p.text for p in spoken if isinstance(p, Text))
    reasoning = "".join(p.text for p in spoken if isinstance(p, Reasoning))
    tools: dict[int, str] = {}
    for part in spoken:
        if isinstance(part, ToolCallPart):
            fragment = part.tool_call
            tools[fragment.index] = tools.get(fragment.index, "") + (fragment.name or "") + fragment.arguments
    reasoning_tokens, *others = toktok.batch_count([reasoning, text, *tools.values()], ENCODING)
    asked, _ = count_input(call.messages, call.params, ENCODING)
    return Usage(input=asked, output=reasoning_tokens + sum(others), reasoning=reasoning_tokens)
