"""Fold the events of a generation into its transcript."""

from typing import Any

import msgspec

from schemas.acceptance import Acceptance, Verdict
from schemas.codec import UnknownEvent, decode_event, decode_header
from schemas.events import AbandonedCall, AnyEvent, Delta, Notice, Restarted, Started, UsageReported, is_terminal
from schemas.usage import Counted, Usage
from services.delivery.requests.answer import Answer, AnswerMessage, ToolCallText

__all__ = ["Alternative", "Transcript"]


class Alternative(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The texts of one of several choices."""

    choice: int = 0
    text: str = ""
    reasoning: str = ""
    refusal: str = ""


class Transcript:
    """Fold stored events by the acceptance rule; a restart resets it.

    If the log no longer keeps the beginning, it is read twice: the first pass detects that (`lost_beginning`), the
    second begins with the oldest kept event of the highest epoch (`joined`).
    """

    def __init__(self, acceptance: Acceptance | None = None) -> None:
        self.started: Started | None = None
        self.terminal: AnyEvent | None = None
        self.usage: Usage | None = None
        self.tokens = 0
        self.events = 0
        self._abandoned: dict[int, AbandonedCall] = {}
        self._acceptance = acceptance or Acceptance()
        self._answers: dict[int, Answer] = {}

    def offer(self, data: bytes) -> None:
        """Fold one stored event; events dropped by the rule and unknown types change no content.

        Raises:
            MalformedEvent: ``data`` is not an event.
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
    def answers(self) -> list[Answer]:
        """The folded choices, in order."""
        return [self._answers[choice] for choice in sorted(self._answers)]

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self._first.text

    @property
    def reasoning(self) -> str:
        """Reasoning of the first choice."""
        return self._first.reasoning

    @property
    def refusal(self) -> str:
        """Refusal of the first choice."""
        return self._first.refusal

    @property
    def choices(self) -> list[str]:
        """Text of every choice, where there are several."""
        return [alternative.text for alternative in self.alternatives]

    @property
    def alternatives(self) -> list[Alternative]:
        """The texts of every choice, where there are several."""
        if len(self._answers) < 2:
            return []
        return [
            Alternative(choice=a.choice, text=a.text, reasoning=a.reasoning, refusal=a.refusal) for a in self.answers
        ]

    @property
    def tool_calls(self) -> list[ToolCallText]:
        """Tool calls by choice and index."""
        return [call for answer in self.answers for call in answer.tool_calls]

    @property
    def messages(self) -> list[AnswerMessage]:
        """Every choice as a message of the next request, where one holds more than text."""
        answers = self.answers
        return [a.message() for a in answers] if any(a.has_more_than_text for a in answers) else []

    @property
    def abandoned_calls(self) -> list[AbandonedCall]:
        """Calls that did not become the answer, in order, each with its own count and usage."""
        return [self._abandoned[number] for number in sorted(self._abandoned)]

    def counted(self) -> Counted:
        """Return the relay's own count: from the terminal, or else from the deltas so far."""
        counted: Any = getattr(self.terminal, "counted", None)
        if isinstance(counted, Counted):
            return counted
        begun = self.started.counted if self.started else Counted()
        return msgspec.structs.replace(begun, output=self.tokens)

    def _apply(self, event: AnyEvent) -> None:
        if isinstance(event, Notice | Restarted) and event.call is not None:
            self._abandoned[event.call.number] = event.call
        match event:
            case Delta():
                self._delta(event)
            case Started():
                self.started = event
            case Restarted():
                self._answers.clear()
                self.tokens = 0
            case UsageReported() if event.call:
                self._report(event)
            case UsageReported():
                self.usage = event.usage
            case _ if is_terminal(event):
                self.terminal = event
            case _:
                pass

    def _report(self, event: UsageReported) -> None:
        """Record the usage of an abandoned call; without its kept end, the usage is its only source."""
        known = self._abandoned.get(event.call) or AbandonedCall(
            number=event.call,
            provider=event.provider,
            upstream_model=event.upstream_model,
            upstream_id=event.upstream_id,
        )
        self._abandoned[event.call] = msgspec.structs.replace(known, usage=event.usage, source=event.source)

    def _delta(self, event: Delta) -> None:
        self.tokens = event.tokens
        answer = self._answers.get(event.choice)
        if answer is None:
            answer = self._answers[event.choice] = Answer(event.choice)
        answer.add(event)

    @property
    def _first(self) -> Answer:
        return self._answers.get(0) or Answer(0)
