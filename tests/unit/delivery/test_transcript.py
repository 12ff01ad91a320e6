"""What a generation has said, folded from whatever the log holds of it."""

import random

import pytest

from schemas.codec import MalformedEvent, encode_event
from schemas.events import AnyEvent, Cancelled, Completed, Delta, Restarted, Started, ToolCall, UsageReported
from schemas.usage import Counted, Usage
from services.delivery.core.transcript import Transcript

STARTED = Started(
    generation="g",
    seq=0,
    model="m",
    provider="p",
    upstream_model="u",
    counted=Counted(input=7, encoding="e", exact=True),
)


def fold(*events: AnyEvent) -> Transcript:
    transcript = Transcript()
    for event in events:
        transcript.offer(encode_event(event))
    return transcript


def text(seq: int, said: str, **fields: int) -> Delta:
    return Delta(generation="g", seq=seq, text=said, tokens=seq, **fields)


def test_nothing_has_been_said_at_first() -> None:
    empty = Transcript()
    assert (empty.text, empty.choices, empty.reasoning, empty.tool_calls, empty.events) == ("", [], "", [], 0)
    assert empty.counted() == Counted()


def test_repeats_and_gaps_change_nothing() -> None:
    events = [STARTED, *(text(n, f"{n} ") for n in range(1, 20))]
    rng = random.Random(5)
    noisy = [e for n, event in enumerate(events) for e in (event, *rng.choices(events[: n + 1], k=2))]
    noisy.insert(30, text(500, "gap"))
    assert fold(*noisy).text == fold(*events).text == "".join(f"{n} " for n in range(1, 20))
    assert fold(*noisy).events == len(events)


def test_restart_forgets_what_was_said_but_not_what_was_used() -> None:
    restarted = Restarted(generation="g", seq=3, epoch=2, reason="producer_lost")
    call = Delta(generation="g", seq=2, tool_call=ToolCall(id="c", name="f"), tokens=2)
    after = Delta(generation="g", seq=4, epoch=2, text="again", tokens=1)
    said = fold(STARTED, text(1, "before"), call, restarted, text(3, "zombie"), after)
    assert (said.text, said.tool_calls, said.tokens) == ("again", [], 1)
    assert said.counted() == Counted(input=7, output=1, exact=True, encoding="e")


def test_choices_are_told_apart() -> None:
    said = fold(STARTED, text(1, "a"), text(2, "b", choice=1), text(3, "A"), text(4, "B", choice=1))
    assert said.text == "aA"
    assert said.choices == ["aA", "bB"]
    assert fold(STARTED, text(1, "a")).choices == []


def test_fragments_of_tool_calls_are_joined_by_index() -> None:
    parts = [ToolCall(index=1, id="y", name="g"), ToolCall(index=0, id="x", name="f", arguments="{")]
    parts += [ToolCall(index=1, arguments="[]"), ToolCall(index=0, arguments="}")]
    said = fold(STARTED, *(Delta(generation="g", seq=n, tool_call=p, tokens=n) for n, p in enumerate(parts, 1)))
    assert [(c.index, c.id, c.name, c.arguments) for c in said.tool_calls] == [(0, "x", "f", "{}"), (1, "y", "g", "[]")]


def test_terminal_brings_the_final_count_and_late_usage_counts() -> None:
    counted = Counted(input=7, output=9, exact=True)
    late = UsageReported(generation="g", seq=3, usage=Usage(input=7, output=10))
    end = Completed(generation="g", seq=2, finish_reason="stop", counted=counted)
    said = fold(STARTED, text(1, "x"), end, late, text(4, "after the end"))
    assert (said.text, said.counted()) == ("x", counted)
    assert said.usage is not None
    assert said.usage.output == 10


def test_takeover_by_a_terminal_ends_it() -> None:
    said = fold(STARTED, text(1, "x"), Cancelled(generation="g", seq=2, epoch=3, reason="requested"), text(2, "y"))
    assert isinstance(said.terminal, Cancelled)
    assert said.text == "x"


def test_unknown_types_hold_their_place() -> None:
    transcript = fold(STARTED, text(1, "a"))
    transcript.offer(b'{"type":"hologram","generation":"g","seq":2}')
    transcript.offer(encode_event(text(3, "b")))
    assert transcript.text == "ab"
    assert transcript.events == 4


def test_bytes_that_are_no_event_are_refused() -> None:
    with pytest.raises(MalformedEvent):
        Transcript().offer(b"nonsense")
