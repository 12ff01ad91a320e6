"""What a producer does with a request, given what the log already holds of its generation."""

from typing import Literal, NamedTuple

from schemas.acceptance import BEGINNING, Position, Verdict, joining, judge
from schemas.codec import MalformedEvent, decode_header

__all__ = ["Begun", "Decision", "decide", "fold"]

Decision = Literal["run", "restart", "interrupt", "done"]


class Begun(NamedTuple):
    """What the log holds of a generation.

    ``tokens`` is the running count of the last accepted delta; ``has_tokens`` whether there is any; ``last_seq`` the
    stream sequence of the last stored message of any kind, for a conditional append.
    """

    position: Position = BEGINNING
    tokens: int = 0
    has_tokens: bool = False
    last_seq: int = 0


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
    if header.type == "restarted":
        return Begun(position, 0, False, stream_seq)
    has_tokens = begun.has_tokens or header.type == "delta"
    tokens = header.tokens if header.type == "delta" else begun.tokens
    return Begun(position, tokens, has_tokens, stream_seq)


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
