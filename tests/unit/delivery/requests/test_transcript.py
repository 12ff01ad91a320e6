"""Test the transcript of a generation, folded from its kept events."""

import random
from typing import Any

import msgspec
import pytest

from schemas.codec import MalformedEvent, encode_event
from schemas.events import (
    Annotation,
    AnyEvent,
    Binary,
    Cancelled,
    Completed,
    Delta,
    Extra,
    Restarted,
    Signature,
    Started,
    ToolCall,
    UsageReported,
)
from schemas.usage import Counted, Usage
from services.delivery.requests.answer import BINARY_BYTES, BinaryContent
from services.delivery.requests.transcript import Alternative, Transcript

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


def test_a_new_transcript_is_empty() -> None:
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


def test_restart_clears_the_text_and_keeps_the_input_count() -> None:
    restarted = Restarted(generation="g", seq=3, epoch=2, reason="producer_lost")
    call = Delta(generation="g", seq=2, tool_call=ToolCall(id="c", name="f"), tokens=2)
    after = Delta(generation="g", seq=4, epoch=2, text="again", tokens=1)
    said = fold(STARTED, text(1, "before"), call, restarted, text(3, "zombie"), after)
    assert (said.text, said.tool_calls, said.tokens) == ("again", [], 1)
    assert said.counted() == Counted(input=7, output=1, exact=True, encoding="e")


def test_choices_are_kept_apart() -> None:
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


def test_unknown_types_count_as_events() -> None:
    transcript = fold(STARTED, text(1, "a"))
    transcript.offer(b'{"type":"hologram","generation":"g","seq":2}')
    transcript.offer(encode_event(text(3, "b")))
    assert transcript.text == "ab"
    assert transcript.events == 4


def test_bytes_that_are_no_event_are_refused() -> None:
    with pytest.raises(MalformedEvent):
        Transcript().offer(b"nonsense")


def said(*deltas: dict[str, Any]) -> Transcript:
    return fold(STARTED, *(Delta(generation="g", seq=n, **fields) for n, fields in enumerate(deltas, 1)))


def test_calls_of_two_choices_under_one_index_stay_apart_and_name_their_choice() -> None:
    found = said(
        {"choice": 1, "tool_call": ToolCall(id="b", name="f", arguments='{"c":')},
        {"choice": 0, "tool_call": ToolCall(id="a", name="f", arguments='{"c":')},
        {"choice": 1, "tool_call": ToolCall(arguments="1}")},
        {"choice": 0, "tool_call": ToolCall(arguments="0}")},
    )
    assert [(c.choice, c.index, c.id, c.arguments) for c in found.tool_calls] == [
        (0, 0, "a", '{"c":0}'),
        (1, 0, "b", '{"c":1}'),
    ]
    assert [(m.choice, [c["id"] for c in m.tool_calls or ()]) for m in found.messages] == [(0, ["a"]), (1, ["b"])]


def test_texts_of_choices_are_named() -> None:
    found = said({"choice": 2, "text": "c"}, {"choice": 0, "reasoning": "hm"}, {"choice": 2, "refusal": "no"})
    assert found.alternatives == [Alternative(choice=0, reasoning="hm"), Alternative(choice=2, text="c", refusal="no")]
    assert (found.text, found.reasoning, found.refusal) == ("", "hm", "")


def test_pieces_of_a_file_are_joined_and_separate_files_stay_separate() -> None:
    png = Binary(media_type="image/png", data=b"ab")
    found = said(
        {"binary": png},
        {"binary": Binary(media_type="image/gif", data=b"x"), "choice": 1},
        {"binary": Binary(media_type="image/png", data=b"c", continues=True)},
        {"binary": png},
    )
    assert [file for answer in found.answers for file in answer.files()] == [
        BinaryContent(media_type="image/png", seq=1, size=3, data=b"abc"),
        BinaryContent(media_type="image/png", seq=4, size=2, data=b"ab"),
        BinaryContent(choice=1, media_type="image/gif", seq=2, size=1, data=b"x"),
    ]


def test_only_the_size_of_a_large_file_is_stored() -> None:
    piece = {"binary": Binary(media_type="image/png", data=b"x" * (BINARY_BYTES // 2), continues=True)}
    (answer,) = said(piece, piece, piece).answers
    assert answer.files() == [BinaryContent(media_type="image/png", seq=1, size=BINARY_BYTES // 2 * 3)]


def test_an_answer_of_text_alone_has_no_message_of_its_own() -> None:
    assert said({"text": "a"}, {"reasoning": "hm"}, {"annotation": Annotation(kind="url_citation")}).messages == []


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        (
            [
                {"reasoning": "I "},
                {"reasoning": "see."},
                {"signature": Signature(kind="thinking", data="s1")},
                {"signature": Signature(kind="redacted_thinking", data="enc")},
                {"text": "Let me "},
                {"text": "look."},
                {"extra": Extra(kind="server_tool_use", data={"type": "server_tool_use", "id": "x"})},
                {"extra": Extra(kind="container", data={"id": "c"})},
                {"text": "Done."},
                {"tool_call": ToolCall(id="a", name="f", arguments="{}")},
            ],
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I see.", "signature": "s1"},
                    {"type": "redacted_thinking", "data": "enc"},
                    {"type": "text", "text": "Let me look."},
                    {"type": "server_tool_use", "id": "x"},
                    {"type": "text", "text": "Done."},
                ],
                "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
        ),
        (
            [
                {"reasoning": "hm"},
                {"signature": Signature(kind="reasoning.text", data="s", details={"index": 0, "format": "f"})},
                {"signature": Signature(kind="reasoning.encrypted", data="e", details={"id": "rs"})},
                {"text": "x"},
            ],
            {
                "role": "assistant",
                "content": "x",
                "reasoning_details": [
                    {"type": "reasoning.text", "text": "hm", "signature": "s", "index": 0, "format": "f"},
                    {"type": "reasoning.encrypted", "data": "e", "id": "rs"},
                ],
            },
        ),
        (
            [
                {"reasoning": "hm"},
                {"signature": Signature(kind="thinking_blocks", data="s", details={"type": "thinking"})},
                {"signature": Signature(kind="thinking_blocks", data="e", details={"type": "redacted_thinking"})},
            ],
            {
                "role": "assistant",
                "thinking_blocks": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "e"},
                ],
            },
        ),
        (
            [
                {"reasoning": "hm"},
                {"tool_call": ToolCall(id="a", name="f", arguments="{}", signature="sig")},
                {"signature": Signature(kind="thought_signature", data="all")},
            ],
            {
                "role": "assistant",
                "reasoning_content": "hm",
                "tool_calls": [
                    {
                        "id": "a",
                        "type": "function",
                        "function": {"name": "f", "arguments": "{}"},
                        "extra_content": {"google": {"thought_signature": "sig"}},
                    }
                ],
                "extra_content": {"google": {"thought_signature": "all"}},
            },
        ),
        (
            [{"refusal": "I can"}, {"refusal": "not"}, {"extra": Extra(kind="audio", data={"id": "audio_1"})}],
            {"role": "assistant", "refusal": "I cannot", "audio": {"id": "audio_1"}},
        ),
    ],
    ids=["anthropic", "openrouter", "litellm", "gemini", "openai"],
)
def test_an_answer_becomes_a_message_with_all_fields_its_provider_requires(
    deltas: list[dict[str, Any]], message: dict[str, Any]
) -> None:
    assert msgspec.to_builtins(said(*deltas).messages) == [message]
