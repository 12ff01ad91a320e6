"""Joins adjacent fragments that one socket read brought, so that a read becomes few parts."""

import msgspec

from schemas.events import ToolCall
from services.producer.core.parts import Part, Reasoning, Refusal, Text, ToolCallPart

__all__ = ["Joined", "join"]


class Joined:
    """Collects parts in order; neighbours of the same kind and choice (and tool call) become one.

    The joined part keeps the time stamp of its first fragment.
    """

    __slots__ = ("_at", "_choice", "_kind", "_parts", "_texts", "_tool")

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._kind: type[Text | Reasoning | Refusal] | None = None
        self._choice = 0
        self._at: float | None = None
        self._texts: list[str] = []
        self._tool: ToolCall | None = None

    def text(self, kind: type[Text | Reasoning | Refusal], text: str, choice: int = 0, at: float | None = None) -> None:
        """Add a fragment of answer text, reasoning or a refusal."""
        if kind is self._kind and choice == self._choice:
            self._texts.append(text)
            return
        self._flush()
        self._kind, self._choice, self._at = kind, choice, at
        self._texts = [text]

    def tool_call(self, fragment: ToolCall, choice: int = 0, at: float | None = None) -> None:
        """Add a fragment of a tool call. One that brings more than arguments begins a part of its own."""
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
        self._tool, self._choice, self._at = fragment, choice, at
        self._texts = [fragment.arguments]

    def add(self, part: Part) -> None:
        """Add a part of any kind."""
        if isinstance(part, Text | Reasoning | Refusal):
            self.text(type(part), part.text, part.choice, part.at)
        elif isinstance(part, ToolCallPart):
            self.tool_call(part.tool_call, part.choice, part.at)
        else:
            self._flush()
            self._parts.append(part)

    def take(self) -> list[Part]:
        """Return what was collected, and begin anew."""
        self._flush()
        parts, self._parts = self._parts, []
        return parts

    def _flush(self) -> None:
        if self._kind is not None:
            self._parts.append(self._kind("".join(self._texts), self._choice, self._at))
            self._kind = None
        elif self._tool is not None:
            tool = self._tool
            whole = msgspec.structs.replace(tool, arguments="".join(self._texts))
            self._parts.append(ToolCallPart(whole, self._choice, self._at))
            self._tool = None


def join(parts: list[Part]) -> list[Part]:
    """Return ``parts`` with adjacent fragments joined."""
    joined = Joined()
    for part in parts:
        joined.add(part)
    return joined.take()
