"""Build the events of a running generation from the parts of a provider's stream. Pure: publishes nothing."""

from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from schemas.events import (
    AbandonedCall,
    AnyEvent,
    Cancelled,
    Completed,
    Delta,
    Failed,
    Interrupted,
    Notice,
    Restarted,
    Started,
    ToolCall,
    UsageReported,
)
from schemas.requests import Request
from schemas.usage import Counted, Usage, grown
from services.producer.core.bounds import (
    MESSAGE_CHARS,
    NAME_CHARS,
    PIECE_CHARS,
    REASON_CHARS,
    choice_of,
    number,
    pieces,
    usable,
)
from services.producer.core.content import ContentPart, contents
from services.producer.core.parts import (
    Alive,
    AnnotationPart,
    BinaryPart,
    End,
    ExtraPart,
    Finish,
    Identity,
    NoticePart,
    Omitted,
    Part,
    Reasoning,
    Refusal,
    SignaturePart,
    Text,
    ToolCallPart,
    UpstreamFailure,
    UsageBegun,
    UsageLeftOut,
    UsagePart,
)

__all__ = ["CUT_OFF", "Counter", "Generation"]

CUT_OFF = UpstreamFailure("upstream_cut_off", "the provider's stream ended without its end marker", recoverable=True)
_KINDS: Final = 32


class Counter(Protocol):
    """Count output tokens over joined text, one lane for each (kind, choice, index)."""

    def add(self, kind: str, choice: int, index: int, text: str) -> int:
        """Add ``text`` to a lane and return the running count over all lanes."""
        ...

    def total(self) -> int:
        """Return the count over all lanes, from their whole text."""
        ...


class Generation:
    """Build the events of one generation with gapless seqs in one epoch.

    ``ending``: the end marker or the failure with which the provider has ended the answer, if it has.
    ``abandoned`` counts the calls of all producers that were abandoned after their answer had begun.
    """

    def __init__(
        self,
        name: str,
        *,
        epoch: int,
        next_seq: int,
        counter: Callable[[], Counter],
        counted_input: int,
        exact: bool,
        encoding: str,
        abandoned: int = 0,
    ) -> None:
        self.name = name
        self.epoch = epoch
        self.next_seq = next_seq
        self.provider = ""
        self.upstream_model = ""
        self.upstream_id: str | None = None
        self.usage: Usage | None = None
        self._usage_begun: Usage | None = None
        self.usage_source = "stream"
        self._usage_left_out = False
        self.ending: End | UpstreamFailure | None = None
        self.has_tokens = False
        self.abandoned = abandoned
        self._answering = False
        self._new_counter = counter
        self._counter = counter()
        self._counted_input = counted_input
        self._exact = exact
        self._encoding = encoding
        self._finish: dict[int, str] = {}
        self._notice_codes: set[str] = set()
        self._named: set[tuple[int, int]] = set()  # calls whose function's name has been counted
        self._omitted: set[str] = set()  # kinds of content that were announced as left out; at most `_KINDS`

    def counted(self) -> Counted:
        """Return our own count so far, from the whole text."""
        return Counted(
            input=self._counted_input, output=self._counter.total(), exact=self._exact, encoding=self._encoding
        )

    def start(self, request: Request, provider: str, upstream_model: str, at: float) -> Started:
        """Return the first event."""
        self.provider, self.upstream_model = provider, upstream_model
        return Started(
            generation=self.name,
            seq=self._take(),
            epoch=self.epoch,
            at=at,
            model=request.model,
            provider=provider,
            upstream_model=upstream_model,
            counted=Counted(input=self._counted_input, exact=self._exact, encoding=self._encoding),
            metadata=request.metadata,
            key=request.key,
        )

    def restart(
        self, reason: str, provider: str, upstream_model: str, at: float, call: AbandonedCall | None = None
    ) -> Restarted:
        """Return the event that restarts the answer in a new epoch and revokes the text of ``call``."""
        self.provider, self.upstream_model = provider, upstream_model
        self.abandoned = self.abandoned if call is None else call.number
        return Restarted(
            generation=self.name,
            seq=self._take(),
            epoch=self.epoch,
            at=at,
            reason=reason,
            provider=provider,
            upstream_model=upstream_model,
            call=call,
        )

    def begin_anew(self, reason: str, call: AbandonedCall | None, at: float) -> Restarted:
        """Return the event that revokes the text; the same producer calls again in a new epoch."""
        self.epoch += 1
        return self.restart(reason, self.provider, self.upstream_model, at, call)

    def begin_answer(self) -> None:
        """Record that the provider has begun to answer the call, and may charge for it."""
        self._answering = True

    def abandon_call(self, failure: UpstreamFailure) -> AbandonedCall | None:
        """Abandon the current call and reset its state; return its count and usage.

        ``None``: its answer had not begun, so it costs nothing.
        """
        call = self._abandoned(failure.code) if self._answering else None
        self._answering = self.has_tokens = False
        self.upstream_id = None
        self.usage = self._usage_begun = None
        self.usage_source = "stream"
        self.ending = None
        self._finish.clear()
        self._counter = self._new_counter()
        self._named.clear()
        self._omitted.clear()
        self._notice_codes.clear()
        self._usage_left_out = False
        return call

    def _abandoned(self, code: str) -> AbandonedCall:
        self._estimate_usage()
        self.abandoned += 1
        return AbandonedCall(
            number=self.abandoned,
            code=code,
            provider=self.provider,
            upstream_model=self.upstream_model,
            upstream_id=self.upstream_id,
            counted=self.counted(),
            usage=self.usage,
            source=self.usage_source if self.usage is not None else "",
        )

    def notice(
        self,
        code: str,
        message: str,
        at: float,
        *,
        attempt: int | None = None,
        delay: float | None = None,
        call: AbandonedCall | None = None,
    ) -> Notice:
        """Return a notice that names the current provider."""
        return Notice(
            generation=self.name,
            seq=self._take(),
            epoch=self.epoch,
            at=at,
            code=code,
            message=message[:MESSAGE_CHARS],
            attempt=attempt,
            provider=self.provider or None,
            upstream_model=self.upstream_model or None,
            delay=delay,
            call=call,
        )

    def absorb(self, parts: list[Part], at: float) -> list[AnyEvent]:
        """Return the events for the parts of one read; adjacent text of one kind and choice becomes one delta.

        Every event is within the bounds of the broker and of all readers.
        """
        events: list[AnyEvent] = []
        last: Delta | None = None
        for part in parts:
            match part:
                case Text():
                    last = self._append_text("text", part, last, events, at)
                case Reasoning():
                    last = self._append_text("reasoning", part, last, events, at)
                case Refusal():
                    last = self._append_text("refusal", part, last, events, at)
                case ToolCallPart() | BinaryPart() | AnnotationPart() | SignaturePart() | ExtraPart():
                    last = None
                    self._content(part, events, at)
                case Omitted():
                    last = None
                    self._omit(part, events, at)
                case End() | UpstreamFailure():
                    self.ending = part
                    break
                case Alive():
                    pass
                case NoticePart():
                    last = None
                    self._notify(part, events, at)
                case UsageLeftOut() if not self._usage_left_out:
                    last = None
                    self._usage_left_out = True
                    message = f"the provider's usage could not be read: {', '.join(part.reasons)}"
                    events.append(self.notice("usage_left_out", message, at))
                case _:
                    self._remember(part)
        return events

    def end(self, at: float) -> list[AnyEvent]:
        """Return the closing events for the provider's ending; the generation has failed without an end marker."""
        ending = self.ending or CUT_OFF
        if isinstance(ending, UpstreamFailure):
            return self.fail(ending, at)
        self._drop_blank_usage()
        reasons = [self._finish[choice] for choice in sorted(self._finish)]
        completed = Completed(
            generation=self.name,
            seq=self.next_seq + (self.usage is not None),
            epoch=self.epoch,
            at=at,
            finish_reason=reasons[0] if reasons else "stop",
            finish_reasons=reasons if len(reasons) > 1 else [],
            counted=self.counted(),
        )
        return self._close(completed, at)

    def fail(self, failure: UpstreamFailure, at: float) -> list[AnyEvent]:
        """Return the closing events for a failure."""
        self._estimate_usage()
        failed = Failed(
            generation=self.name,
            seq=self.next_seq + (self.usage is not None),
            epoch=self.epoch,
            at=at,
            code=failure.code[:NAME_CHARS],
            message=failure.message[:MESSAGE_CHARS],
            upstream_status=number(failure.upstream_status),
            recoverable=failure.recoverable,
            counted=self.counted(),
        )
        return self._close(failed, at)

    def cancel(self, reason: str, at: float) -> list[AnyEvent]:
        """Return the closing events for a cancellation (``requested`` or ``disconnected``)."""
        self._estimate_usage()
        cancelled = Cancelled(
            generation=self.name,
            seq=self.next_seq + (self.usage is not None),
            epoch=self.epoch,
            at=at,
            reason=reason,
            counted=self.counted(),
        )
        return self._close(cancelled, at)

    def interrupt(self, reason: str, counted: Counted, at: float) -> Interrupted:
        """Return the terminal with which another producer closes a begun generation."""
        return Interrupted(
            generation=self.name, seq=self._take(), epoch=self.epoch, at=at, reason=reason, counted=counted
        )

    def _estimate_usage(self) -> None:
        """Estimate the usage of a broken-off answer: the provider's own count of the input, our count of the output."""
        self._drop_blank_usage()
        begun = self._usage_begun
        if self.usage is None and begun is not None:
            output = max(begun.output, self._counter.total())
            self.usage = msgspec.structs.replace(begun, output=output)
            self.usage_source = "begun"

    def _drop_blank_usage(self) -> None:
        """Discard a report of zero usage where tokens have come."""
        if self.usage is not None and self.usage.blank and self.has_tokens:
            self.usage = None

    def _close(self, terminal: Completed | Failed | Cancelled, at: float) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        if self.usage is not None:
            events.append(
                UsageReported(
                    generation=self.name,
                    seq=self._take(),
                    epoch=self.epoch,
                    at=at,
                    usage=self.usage,
                    provider=self.provider,
                    upstream_model=self.upstream_model,
                    upstream_id=self.upstream_id,
                    source=self.usage_source,
                )
            )
        self._take()
        events.append(terminal)
        return events

    def _notify(self, part: NoticePart, events: list[AnyEvent], at: float) -> None:
        """Append a notice about an irregularity of the stream, once per code and generation."""
        if part.code not in self._notice_codes:
            self._notice_codes.add(part.code)
            events.append(self.notice(part.code, part.message, at))

    def _remember(self, part: Part) -> None:
        match part:
            case Finish():
                self._finish[choice_of(part.choice)] = part.reason[:REASON_CHARS]
            case UsagePart():
                if (usage := usable(part.usage)) is not None:
                    self.usage = usage if self.usage is None else grown(self.usage, usage)
            case UsageBegun():
                self._usage_begun = usable(part.usage) or self._usage_begun
            case Identity():
                self.upstream_id = (part.upstream_id or "")[:NAME_CHARS] or self.upstream_id
                self.upstream_model = (part.model or "")[:NAME_CHARS] or self.upstream_model
            case _:
                pass

    def _append_text(
        self, kind: str, part: Text | Reasoning | Refusal, last: Delta | None, events: list[AnyEvent], at: float
    ) -> Delta | None:
        choice = choice_of(part.choice)
        for text in pieces(part.text, PIECE_CHARS):
            tokens = self._counter.add(kind, choice, 0, text)
            text_so_far = getattr(last, kind) if last is not None and last.choice == choice else None
            if last is not None and text_so_far is not None and len(text_so_far) + len(text) <= PIECE_CHARS:
                setattr(last, kind, text_so_far + text)
                last.tokens = tokens
            else:
                last = self._delta(choice, at, part.at, tokens)
                setattr(last, kind, text)
                events.append(last)
        return last

    def _content(self, part: ContentPart, events: list[AnyEvent], at: float) -> None:
        choice = choice_of(part.choice)
        for content in contents(part):
            if isinstance(content, Omitted):
                self._omit(content, events, at)
                continue
            tokens = self._count_call(choice, content.value) if isinstance(content.value, ToolCall) else None
            delta = self._delta(choice, at, part.at, tokens)
            setattr(delta, content.field, content.value)
            events.append(delta)

    def _count_call(self, choice: int, call: ToolCall) -> int:
        """Count a fragment; the function's name counts once for each call, however often it is sent."""
        named = (choice, call.index)
        text = call.arguments
        if call.name and named not in self._named:
            self._named.add(named)
            text = call.name + text
        return self._counter.add("tool", choice, call.index, text)

    def _omit(self, omitted: Omitted, events: list[AnyEvent], at: float) -> None:
        """Append a notice about omitted content, once for each kind."""
        kind = omitted.kind[:NAME_CHARS]
        if kind not in self._omitted and len(self._omitted) < _KINDS:
            self._omitted.add(kind)
            events.append(self.notice("content_omitted", f"{kind} was omitted: {omitted.reason[:NAME_CHARS]}", at))

    def _delta(self, choice: int, at: float, provider_at: float | None, tokens: int | None) -> Delta:
        self.has_tokens = True
        return Delta(
            generation=self.name,
            seq=self._take(),
            epoch=self.epoch,
            at=at,
            choice=choice,
            tokens=self._counter.total() if tokens is None else tokens,
            provider_at=provider_at,
        )

    def _take(self) -> int:
        seq = self.next_seq
        self.next_seq += 1
        return seq
