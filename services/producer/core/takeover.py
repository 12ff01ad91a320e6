"""What a producer does with a request, given what the log already holds of its generation."""

from typing import Literal, NamedTuple

from schemas.acceptance import BEGINNING, Position, Verdict, joining, judge
from schemas.codec import MalformedEvent, UnknownEvent, decode_event, decode_header
from schemas.events import AbandonedCall, Notice, Restarted, Started, UsageReported
from schemas.usage import Counted, Usage

__all__ = ["Begun", "Decision", "decide", "fold", "lost_call"]

Decision = Literal["run", "restart", "interrupt", "done"]


class Begun(NamedTuple):
    """What the log holds of a generation.

    ``tokens`` is the running count of the last accepted delta; ``has_tokens`` whether there is any; ``last_seq`` the
    stream sequence of the last stored message of any kind, for a conditional append. ``provider`` and
    ``upstream_model``: who was asked last; ``usage``: what it reported; ``abandoned``: how many calls were left before.
    """

    position: Position = BEGINNING
    tokens: int = 0
    has_tokens: bool = False
    last_seq: int = 0
    provider: str = ""
    upstream_model: str = ""
    usage: UsageReported | None = None
    abandoned: int = 0


def fold(begun: Begun, data: bytes, stream_seq: int) -> Begun:
    """Return ``begun`` after one more stored message; one that is no event only counts as stored.

    Where the log no longer keeps a generation's beginning, the oldest kept event stands for it.
    """
    try:
        header = decode_header(data)
    except MalformedEvent:
        return begun._replace(last_seq=stream_seq)
    if begun.position is BEGINNING and header.seq > 0:
        begun = begun._replace(position=joining(header.epoch, header.seq))
    position, verdict = judge(begun.position, header.type, header.epoch, header.seq)
    if verdict is not Verdict.ACCEPTED:
        return begun._replace(last_seq=stream_seq)
    begun = begun._replace(position=position, last_seq=stream_seq)
    if header.type == "delta":
        return begun._replace(tokens=header.tokens, has_tokens=True)
    return _told(begun, data)


def _told(begun: Begun, data: bytes) -> Begun:
    """Return ``begun`` after what an accepted event other than a delta says of its calls."""
    try:
        event = decode_event(data)
    except (MalformedEvent, UnknownEvent):
        return begun
    match event:
        case Started():
            return begun._replace(provider=event.provider, upstream_model=event.upstream_model)
        case Restarted():
            lost = begun.abandoned + (begun.has_tokens or begun.usage is not None)
            return begun._replace(
                tokens=0,
                has_tokens=False,
                provider=event.provider,
                upstream_model=event.upstream_model,
                usage=None,
                abandoned=lost if event.call is None else event.call.number,
            )
        case Notice():
            return begun._replace(
                provider=event.provider or begun.provider,
                upstream_model=event.upstream_model or begun.upstream_model,
                abandoned=begun.abandoned if event.call is None else event.call.number,
            )
        case UsageReported() if not event.call:
            return begun._replace(usage=event)
        case _:
            return begun


def lost_call(begun: Begun, request: Counted) -> AbandonedCall | None:
    """Return what the log holds of the call that lost its producer; ``None`` where it holds nothing.

    ``request`` counts its input.

    Only what was logged is known of it, so the numbers are an estimate unless its provider had reported already.
    """
    if not begun.has_tokens and begun.usage is None:
        return None
    told = begun.usage
    usage: Usage | None = None if told is None else told.usage
    return AbandonedCall(
        number=begun.abandoned + 1,
        code="producer_lost",
        provider=begun.provider,
        upstream_model=begun.upstream_model,
        upstream_id=None if told is None else told.upstream_id,
        counted=Counted(input=request.input, output=begun.tokens, encoding=request.encoding),
        usage=usage,
        source="" if told is None else told.source,
    )


def decide(begun: Begun, *, may_restart: bool) -> Decision:
    """Return what to do: ``run`` it, ``restart`` it in a new epoch, ``interrupt`` it, or nothing (``done``).

    A generation without tokens simply runs: nobody has seen anything that must be taken back.
    """
    if begun.position.ended:
        return "done"
    if begun.position.next_seq == 0:
        return "run"
    if not begun.has_tokens or may_restart:
        return "restart"
    return "interrupt"
