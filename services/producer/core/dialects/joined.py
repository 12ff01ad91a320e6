"""Joins adjacent fragments that one socket read brought, so that a read becomes few parts."""

from schemas.events import ToolCall
from schemas.usage import grown
from services.producer.core.parts import End, Part, Reasoning, Text, ToolCallPart, UpstreamFailure, UsagePart

__all__ = ["Joined", "join"]


class Joined:
    """Collects parts in order; neighbours of the same kind and choice (and tool call) become one.

    The joined part keeps the time stamp of its first fragment. Reports of usage, which some providers repeat with every
    token, become one report behind everything but the end.
    """

    __slots__ = ("_at", "_choice", "_kind", "_parts", "_texts", "_tool", "_usage")

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._kind: type[Text | Reasoning] | None = None
        self._choice = 0
        self._at: float | None = None
        self._texts: list[str] = []
        self._tool: ToolCall | None = None
        self._usage: UsagePart | None = None

    def text(self, kind: type[Text | Reasoning], text: str, choice: int = 0, at: float | None = None) -> None:
        """Add a fragment of answer text or reasoning."""
        if kind is self._kind and choice == self._choice:
            self._texts.append(text)
            return
        self._flush()
        self._kind, self._choice, self._at = kind, choice, at
        self._texts = [text]

    def tool_call(self, fragment: ToolCall, choice: int = 0, at: float | None = None) -> None:
        """Add a fragment of a tool call. One that brings an id or a name begins a part of its own."""
        tool = self._tool
        if (
            tool is not None
            and tool.index == fragment.index
            and choice == self._choice
            and fragment.id is None
            and fragment.name is None
        ):
            self._texts.append(fragment.arguments)
            return
        self._flush()
        self._tool, self._choice, self._at = fragment, choice, at
        self._texts = [fragment.arguments]

    def add(self, part: Part) -> None:
        """Add a part of any kind."""
        if isinstance(part, Text | Reasoning):
            self.text(type(part), part.text, part.choice, part.at)
        elif isinstance(part, ToolCallPart):
            self.tool_call(part.tool_call, part.choice, part.at)
        elif isinstance(part, UsagePart):
            self._usage = part if self._usage is None else UsagePart(grown(self._usage.usage, part.usage))
        else:
            self._flush()
            if isinstance(part, End | UpstreamFailure):
                self._flush_usage()
            self._parts.append(part)

    def take(self) -> list[Part]:
        """Return what was collected, and begin anew."""
        self._flush()
        self._flush_usage()
        parts, self._parts = self._parts, []
        return parts

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
            whole = ToolCall(index=tool.index, id=tool.id, name=tool.name, arguments="".join(self._texts))
            self._parts.append(ToolCallPart(whole, self._choice, self._at))
            self._tool = None


def join(parts: list[Part]) -> list[Part]:
    """Return ``parts`` with adjacent fragments joined."""
    joined = Joined()
    for part in parts:
        joined.add(part)
    return joined.take()
