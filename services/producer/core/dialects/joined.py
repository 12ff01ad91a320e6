"""Join adjacent fragments of one socket read, so that a read becomes few parts."""

import msgspec

from schemas.events import ToolCall
from schemas.usage import grown
from services.producer.core.dialects.halves import Halves
from services.producer.core.parts import (
    End,
    Finish,
    Part,
    Reasoning,
    Refusal,
    Text,
    ToolCallPart,
    UpstreamFailure,
    UsagePart,
)

__all__ = ["Joined", "join"]


class Joined:
    """Collect parts in order; neighbours of the same kind and choice (and tool call) become one.

    The joined part keeps the time stamp of its first fragment. Usage reports, which some providers repeat with every
    token, become one report before the end. ``halves``: set when texts may contain halves of surrogate pairs. ``begun``
    and ``finished``: the choices that have content and a finish reason. ``has_usage``: usage was reported.
    """

    __slots__ = (
        "_at",
        "_choice",
        "_kind",
        "_parts",
        "_texts",
        "_tool",
        "_usage",
        "begun",
        "finished",
        "halves",
        "has_usage",
    )

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._kind: type[Text | Reasoning | Refusal] | None = None
        self._choice = 0
        self._at: float | None = None
        self._texts: list[str] = []
        self._tool: ToolCall | None = None
        self._usage: UsagePart | None = None
        self.halves: Halves | None = None
        self.begun: set[int] = set()
        self.finished: set[int] = set()
        self.has_usage = False

    def text(self, kind: type[Text | Reasoning | Refusal], text: str, choice: int = 0, at: float | None = None) -> None:
        """Add a fragment of answer text, reasoning or a refusal."""
        if self.halves is not None and not (text := self.halves.mended((kind, choice, 0), text)):
            return
        if kind is self._kind and choice == self._choice:
            self._texts.append(text)
            return
        self._flush()
        self.begun.add(choice)
        self._kind, self._choice, self._at = kind, choice, at
        self._texts = [text]

    def tool_call(self, fragment: ToolCall, choice: int = 0, at: float | None = None) -> None:
        """Add a fragment of a tool call. A fragment with more than arguments begins a new part."""
        if self.halves is not None:
            fragment = _mended(fragment, self.halves, choice)
        tool = self._tool
        if (
            tool is not None
            and tool.index == fragment.index
            and choice == self._choice
            and fragment.id is None
            and fragment.name is None
            and fragment.signature is None
        ):
            self._texts.append(fragment.arguments)
            return
        self._flush()
        self.begun.add(choice)
        self._tool, self._choice, self._at = fragment, choice, at
        self._texts = [fragment.arguments]

    def add(self, part: Part) -> None:
        """Add a part of any kind."""
        if isinstance(part, Text | Reasoning | Refusal):
            self.text(type(part), part.text, part.choice, part.at)
        elif isinstance(part, ToolCallPart):
            self.tool_call(part.tool_call, part.choice, part.at)
        elif isinstance(part, UsagePart):
            self.has_usage = True
            self._usage = part if self._usage is None else UsagePart(grown(self._usage.usage, part.usage))
        else:
            self._flush()
            if isinstance(part, End | UpstreamFailure):
                self._flush_usage()
            self._parts.append(part)
            self._note(part)

    def release(self) -> None:
        """Stop waiting for the other halves of surrogate pairs."""
        if self.halves is None:
            return
        for (kind, choice, index), text in self.halves.left():
            if kind is ToolCallPart:
                self.tool_call(ToolCall(index=index, arguments=text), choice)
            else:
                self.text(kind, text, choice)

    def take(self) -> list[Part]:
        """Return and clear the collected parts."""
        self._flush()
        self._flush_usage()
        parts, self._parts = self._parts, []
        return parts

    def _note(self, part: Part) -> None:
        if isinstance(part, Finish):
            self.finished.add(part.choice)
        elif (choice := getattr(part, "choice", None)) is not None:
            self.begun.add(choice)

    def _flush_usage(self) -> None:
        if self._usage is not None:
            self._parts.append(self._usage)
            self._usage = None

    def _flush(self) -> None:
        if self._kind is not None:
            self._parts.append(self._kind("".join(self._texts), self._choice, self._at))
            self._kind = None
        elif self._tool is not None:
            tool = self._tool
            whole = msgspec.structs.replace(tool, arguments="".join(self._texts))
            self._parts.append(ToolCallPart(whole, self._choice, self._at))
            self._tool = None


def _mended(fragment: ToolCall, halves: Halves, choice: int) -> ToolCall:
    arguments = halves.mended((ToolCallPart, choice, fragment.index), fragment.arguments)
    return msgspec.structs.replace(fragment, arguments=arguments)


def join(parts: list[Part]) -> list[Part]:
    """Return ``parts`` with adjacent fragments joined."""
    joined = Joined()
    for part in parts:
        joined.add(part)
    return joined.take()
