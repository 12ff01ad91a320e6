"""Generations as producers write them, for billing's tests."""

from collections.abc import Iterable

from schemas.codec import encode_event
from schemas.events import AbandonedCall, Completed, Delta, Event, Restarted, Started, UsageReported
from schemas.subjects import Address, token_subject
from schemas.usage import Counted, Usage
from services.billing.core.intake import Record, read_record

START = 1_700_000_000.0


def address(generation: str = "g", session: str = "s", tenant: str = "default") -> Address:
    return Address(0, tenant, session, generation)


def history(
    generation: str = "g",
    *,
    deltas: int = 3,
    reported: Usage | None = None,
    terminal: type[Event] | None = Completed,
    at: float = START,
    model: str = "gpt",
    provider: str = "openai",
) -> list[Event]:
    """Return one generation's events: every delta holds ten tokens, the input seven."""
    started = Started(
        generation=generation,
        seq=0,
        at=at,
        model=model,
        provider=provider,
        upstream_model=model,
        counted=Counted(input=7, exact=True, encoding="o200k_base"),
    )
    events: list[Event] = [started]
    for number in range(deltas):
        events.append(
            Delta(generation=generation, seq=len(events), at=at + number, text="word ", tokens=10 * (number + 1))
        )
    if reported is not None:
        events.append(UsageReported(generation=generation, seq=len(events), at=at + deltas, usage=reported))
    counted = Counted(input=7, output=10 * deltas, exact=True, encoding="o200k_base")
    if terminal is not None:
        field = {"completed": "finish_reason", "failed": "code"}.get(str(terminal.__struct_config__.tag), "reason")
        end = {field: "stop", "seq": len(events), "at": at + deltas, "counted": counted}
        events.append(terminal(generation=generation, **end))
    return events


def restarted_history(
    generation: str = "g",
    *,
    calls: int = 3,
    reported: Usage | None = None,
    terminal: type[Event] | None = Completed,
    is_told: bool = True,
) -> list[Event]:
    """Return one generation's events where each call but the last broke off after twenty tokens.

    Abandoned calls have the names ``up-1``, ``up-2`` …; without ``is_told`` their producers were lost.
    """
    events: list[Event] = history(generation, deltas=2, terminal=None)
    for number in range(1, calls):
        counted = Counted(input=7, output=20, exact=True, encoding="o200k_base")
        call = AbandonedCall(
            number=number,
            code="upstream_cut_off",
            provider="openai",
            upstream_model="gpt",
            upstream_id=f"up-{number}",
            counted=counted,
        )
        left = call if is_told else None
        events.append(
            Restarted(generation=generation, seq=0, reason="again", provider="openai", upstream_model="gpt", call=left)
        )
        events += history(generation, deltas=2, terminal=None)[1:]
    events += history(generation, deltas=2, reported=reported, terminal=terminal)[3:]
    epoch = 1
    for seq, event in enumerate(events):
        epoch += isinstance(event, Restarted)
        event.seq, event.epoch = seq, epoch
    return events


def records(events: Iterable[Event], first: int = 1, place: Address | None = None) -> list[Record]:
    """Return events as the log would hold them, from the stream sequence ``first`` on."""
    return [
        read_record(seq, token_subject(place or address(event.generation)), encode_event(event))
        for seq, event in enumerate(events, first)
    ]
