"""Decide how to take over a generation, from its events in the log."""

from typing import Literal

import msgspec

from schemas.acceptance import Acceptance, Position, Verdict
from schemas.codec import MalformedEvent, UnknownEvent, decode_event, decode_header
from schemas.events import AbandonedCall, Notice, Restarted, Started, UsageReported
from schemas.usage import Counted, Usage

__all__ = ["Begun", "Decision", "decide", "lost_call"]

Decision = Literal["run", "restart", "interrupt", "done"]


class Begun(msgspec.Struct):
    """The state of a generation in the log, folded message by message with `take`.

    ``tokens``: the running count of the last accepted delta. ``has_tokens``: whether there is a token, or may have been
    among expired events. ``provider`` and ``upstream_model``: those of the last call; ``usage``: its report;
    ``abandoned``: number of calls abandoned before.

    A log that no longer keeps the generation's beginning is read twice: the first pass detects that (`lost_beginning`)
    and finds the highest epoch, the second pass starts with `joining` that epoch.
    """

    acceptance: Acceptance = msgspec.field(default_factory=Acceptance)
    tokens: int = 0
    has_tokens: bool = False
    provider: str = ""
    upstream_model: str = ""
    usage: UsageReported | None = None
    abandoned: int = 0

    @classmethod
    def joining(cls, highest: int) -> "Begun":
        """Return an empty state that joins at the oldest kept event of the epoch ``highest``."""
        return cls(Acceptance.joining(highest))

    @property
    def position(self) -> Position:
        """Return the position after the last accepted event."""
        return self.acceptance.position

    @property
    def last_seq(self) -> int:
        """Return the stream sequence of the last stored message of any kind, for a conditional append."""
        return self.acceptance.through

    @property
    def lost_beginning(self) -> bool:
        """Return whether the first events have expired."""
        return self.acceptance.lost_beginning

    def take(self, data: bytes, stream_seq: int) -> None:
        """Fold the next stored message; a message that is not an event only advances the stream sequence."""
        try:
            header = decode_header(data)
        except MalformedEvent:
            self.acceptance.through = stream_seq
            return
        if self.acceptance.offer(header, stream_seq) is not Verdict.ACCEPTED:
            return
        if header.type == "delta":
            self.tokens, self.has_tokens = header.tokens, True
            return
        if self.acceptance.joined_at == stream_seq and header.type != "restarted":
            self.has_tokens = True
        self._take(data)

    def _take(self, data: bytes) -> None:
        """Fold an accepted event other than a delta."""
        try:
            event = decode_event(data)
        except (MalformedEvent, UnknownEvent):
            return
        match event:
            case Started():
                self.provider, self.upstream_model = event.provider, event.upstream_model
            case Restarted():
                lost = self.abandoned + (self.has_tokens or self.usage is not None)
                self.abandoned = lost if event.call is None else event.call.number
                self.tokens, self.has_tokens, self.usage = 0, False, None
                self.provider, self.upstream_model = event.provider, event.upstream_model
            case Notice():
                self.provider = event.provider or self.provider
                self.upstream_model = event.upstream_model or self.upstream_model
                self.abandoned = self.abandoned if event.call is None else event.call.number
            case UsageReported() if not event.call:
                self.usage = event
            case _:
                pass


def lost_call(begun: Begun, request: Counted) -> AbandonedCall | None:
    """Return the logged part of the call that lost its producer, or ``None`` if nothing was logged.

    ``request``: the count of its input. The numbers are an estimate, unless its provider had reported already.
    """
    if not begun.has_tokens and begun.usage is None:
        return None
    reported = begun.usage
    usage: Usage | None = None if reported is None else reported.usage
    return AbandonedCall(
        number=begun.abandoned + 1,
        code="producer_lost",
        provider=begun.provider,
        upstream_model=begun.upstream_model,
        upstream_id=None if reported is None else reported.upstream_id,
        counted=Counted(input=request.input, output=begun.tokens, encoding=request.encoding),
        usage=usage,
        source="" if reported is None else reported.source,
    )


def decide(begun: Begun, *, may_restart: bool) -> Decision:
    """Decide whether to ``run`` it, ``restart`` it in a new epoch or ``interrupt`` it, or that it is ``done``.

    Without tokens it always begins again: no reader has seen text that must be revoked.
    """
    if begun.position.ended:
        return "done"
    if begun.position.next_seq == 0:
        return "run"
    if not begun.has_tokens or may_restart:
        return "restart"
    return "interrupt"
