"""What a generation has said so far, folded from its events."""

from typing import Any

import msgspec

from schemas.acceptance import Acceptance, Verdict
from schemas.codec import UnknownEvent, decode_event, decode_header
from schemas.events import AnyEvent, Delta, Restarted, Started, UsageReported, is_terminal
from schemas.usage import Counted, Usage

__all__ = ["ToolCallText", "Transcript"]


class ToolCallText(msgspec.Struct, kw_only=True):
    """One tool call, its fragments joined."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Transcript:
    """Folds stored events by the acceptance rule; a restart begins it anew.

    Where the log no longer keeps the beginning, it is read twice: the first time shows that (`lost_beginning`), the
    second time begins with the oldest kept event of the highest epoch (`joined`).
    """

    def __init__(self, acceptance: Acceptance | None = None) -> None:
        self.started: Started | None = None
        self.terminal: AnyEvent | None = None
        self.usage: Usage | None = None
        self.tokens = 0
        self.events = 0
        self._acceptance = acceptance or Acceptance()
        self._texts: dict[int, list[str]] = {}
        self._reasoning: list[str] = []
        self._calls: dict[int, ToolCallText] = {}

    def offer(self, data: bytes) -> None:
        """Take one stored event; what the rule drops, and unknown types, change nothing that is shown.

        Raises:
            MalformedEvent: it is no event.
        """
        header = decode_header(data)
        if self._acceptance.offer(header) is not Verdict.ACCEPTED:
            return
        self.events += 1
        try:
            self._apply(decode_event(data))
        except UnknownEvent:
            return

    @property
    def lost_beginning(self) -> bool:
        """Whether the first events have expired."""
        return self._acceptance.lost_beginning

    @property
    def headless(self) -> bool:
        """Whether the log no longer keeps the first events."""
        return self._acceptance.headless

    def joined(self) -> "Transcript":
        """Return an empty transcript that begins with the oldest event of the highest epoch that this one has read."""
        return Transcript(Acceptance.joining(self._acceptance.highest))

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return "".join(self._texts.get(0, []))

    @property
    def choices(self) -> list[str]:
        """Text of every choice, where there are several."""
        return ["".join(self._texts[c]) for c in sorted(self._texts)] if len(self._texts) > 1 else []

    @property
    def reasoning(self) -> str:
        """Text of the reasoning."""
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> list[ToolCallText]:
        """Tool calls in order."""
        return [self._calls[index] for index in sorted(self._calls)]

    def counted(self) -> Counted:
        """Return our own count: the terminal's, else what the deltas say so far."""
        counted: Any = getattr(self.terminal, "counted", None)
        if isinstance(counted, Counted):
            return counted
        begun = self.started.counted if self.started else Counted()
        return msgspec.structs.replace(begun, output=self.tokens)

    def _apply(self, event: AnyEvent) -> None:
        match event:
            case Delta():
                self._delta(event)
            case Started():
                self.started = event
            case Restarted():
                self._texts.clear()
                self._reasoning.clear()
                self._calls.clear()
                self.tokens = 0
            case UsageReported():
                self.usage = event.usage
            case _ if is_terminal(event):
                self.terminal = event
            case _:
                pass

    def _delta(self, event: Delta) -> None:
        self.tokens = event.tokens
        if event.text is not None:
            self._texts.setdefault(event.choice, []).append(event.text)
        elif event.reasoning is not None:
            self._reasoning.append(event.reasoning)
        elif event.tool_call is not None:
            part = event.tool_call
            call = self._calls.setdefault(part.index, ToolCallText(index=part.index))
            call.id = part.id or call.id
            call.name = part.name or call.name
            call.arguments += part.arguments
