"""Test the places of usage in providers' streams, and the usage that a parser reports."""

import msgspec
import pytest

from schemas.events import Completed, Notice, UsageReported
from schemas.usage import Usage
from services.producer.core.counting import GenerationCounter
from services.producer.core.dialects import DialectName, dialect_of
from services.producer.core.generation import Generation
from services.producer.core.parts import End, Part, Text, UpstreamFailure, UsageBegun, UsageLeftOut, UsagePart


def fed(*data: str, dialect: DialectName = "openai", base_url: str = "", at_once: bool = True) -> list[Part]:
    parser = dialect_of(dialect, base_url=base_url).parser()
    wire = [f"data: {one}\n\n".encode() for one in data]
    return parser.feed(b"".join(wire)) if at_once else [part for one in wire for part in parser.feed(one)]


def usage_of(parts: list[Part]) -> Usage | None:
    """Return the usage that a generation reports for the parts, without the provider's object."""
    run = Generation(
        "g",
        epoch=1,
        next_seq=0,
        counter=lambda: GenerationCounter("o200k_base", True),
        counted_input=3,
        exact=True,
        encoding="o200k_base",
    )
    assert not any(isinstance(part, UpstreamFailure) for part in parts)
    run.absorb(parts, 1.0)
    events = run.end(2.0)
    assert isinstance(events[-1], Completed)
    found = next((e.usage for e in events if isinstance(e, UsageReported)), None)
    return None if found is None else msgspec.structs.replace(found, raw=None)


TEXT = '{"choices":[{"index":0,"delta":{"content":"Hi"}}]}'
STOP = '{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
USAGE = '{"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15}}'


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        (USAGE, Usage(input=10, output=5)),
        ('{"choices":[],"usage":{"prompt_tokens":10.0,"completion_tokens":"5"}}', Usage(input=10, output=5)),
        (
            '{"choices":[{"index":0,"delta":{},"finish_reason":"stop",'
            '"usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15,"cached_tokens":4}}]}',
            Usage(input=10, output=5, cached_input=4),
        ),
        (
            '{"choices":[],"x_groq":{"id":"req_1","usage":{"prompt_tokens":10,"completion_tokens":5}}}',
            Usage(input=10, output=5),
        ),
        (
            '{"choices":[],"timings":{"cache_n":4,"prompt_n":6,"predicted_n":5,"predicted_ms":1.5}}',
            Usage(input=10, output=5, cached_input=4),
        ),
        ('{"done":true,"prompt_eval_count":10,"eval_count":5}', Usage(input=10, output=5)),
        ('{"choices":[],"usage":null}', None),
        ('{"choices":[],"usage":{}}', None),
        ('{"choices":[],"usage":"soon"}', None),
        ('{"choices":[],"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}', None),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_usage_is_found_where_a_server_puts_it(chunk: str, expected: Usage | None, at_once: bool) -> None:
    assert usage_of(fed(TEXT, STOP, chunk, "[DONE]", at_once=at_once)) == expected


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    "behind",
    [
        '{"choices":[],"usage":{}}',
        '{"choices":[],"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}',
        '{"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":0}}',
        '{"choices":[],"usage":{"completion_tokens":5}}',
        '{"choices":[],"usage":"?"}',
    ],
)
def test_later_smaller_usage_does_not_replace_the_counts(behind: str, at_once: bool) -> None:
    assert usage_of(fed(TEXT, STOP, USAGE, behind, "[DONE]", at_once=at_once)) == Usage(input=10, output=5)


@pytest.mark.parametrize("at_once", [True, False])
def test_usage_with_every_chunk_is_one_report_of_the_largest_counts(at_once: bool) -> None:
    chunks = [
        f'{{"choices":[{{"index":0,"delta":{{"content":"a"}}}}],"usage":{{"prompt_tokens":10,"completion_tokens":{n}}}}}'
        for n in range(1, 40)
    ]
    parts = fed(*chunks, STOP, "[DONE]", at_once=at_once)
    assert usage_of(parts) == Usage(input=10, output=39)
    if at_once:
        assert [type(part) for part in parts if isinstance(part, Text | UsagePart | End)] == [Text, UsagePart, End]


def test_usage_of_each_choice_is_summed() -> None:
    first = (
        '{"choices":[{"index":0,"delta":{},"finish_reason":"stop","usage":{"prompt_tokens":10,"completion_tokens":5}}]}'
    )
    second = (
        '{"choices":[{"index":1,"delta":{},"finish_reason":"stop","usage":{"prompt_tokens":10,"completion_tokens":7}}]}'
    )
    assert usage_of(fed(TEXT, first, second, "[DONE]")) == Usage(input=10, output=12)


def test_usage_that_cannot_be_read_is_noticed_once_and_ends_no_answer() -> None:
    parts = fed(TEXT, '{"usage":"soon"}', '{"usage":[7]}', TEXT, STOP, "[DONE]", at_once=False)
    assert parts.count(UsageLeftOut(("usage_unreadable",))) == 2
    run = Generation(
        "g",
        epoch=1,
        next_seq=0,
        counter=lambda: GenerationCounter("o200k_base", True),
        counted_input=3,
        exact=True,
        encoding="o200k_base",
    )
    events = [*run.absorb(parts, 1.0), *run.end(2.0)]
    assert [event.code for event in events if isinstance(event, Notice)] == ["usage_left_out"]
    assert [event.seq for event in events] == list(range(len(events)))
    assert isinstance(events[-1], Completed)


def test_reasoning_tokens_of_grok_are_added_to_the_completion() -> None:
    details = '"completion_tokens_details":{"reasoning_tokens":1}'
    usage = f'{{"choices":[],"usage":{{"prompt_tokens":12,"completion_tokens":1,{details}}}}}'
    assert usage_of(fed(TEXT, STOP, usage, "[DONE]", base_url="https://api.x.ai/v1")) == Usage(
        input=12, output=2, reasoning=1
    )
    assert usage_of(fed(TEXT, STOP, usage, "[DONE]")) == Usage(input=12, output=1, reasoning=1)


def anthropic(started: str, ended: str) -> list[Part]:
    return fed(
        f'{{"type":"message_start","message":{{"id":"m","usage":{started}}}}}',
        '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}',
        f'{{"type":"message_delta","delta":{{"stop_reason":"end_turn"}},"usage":{ended}}}',
        '{"type":"message_stop"}',
        dialect="anthropic",
    )


@pytest.mark.parametrize(
    ("started", "ended", "expected"),
    [
        ('{"input_tokens":15,"output_tokens":1}', '{"input_tokens":0,"output_tokens":5}', Usage(input=15, output=5)),
        ('{"input_tokens":15,"output_tokens":1}', '{"output_tokens":5}', Usage(input=15, output=5)),
        (
            '{"input_tokens":15,"output_tokens":1}',
            '{"input_tokens":15.0,"output_tokens":"5"}',
            Usage(input=15, output=5),
        ),
        ('{"input_tokens":0,"output_tokens":0}', '{"input_tokens":15,"output_tokens":5}', Usage(input=15, output=5)),
        (
            '{"input_tokens":4,"cache_read_input_tokens":1800,"cache_creation_input_tokens":248,'
            '"cache_creation":{"ephemeral_5m_input_tokens":148,"ephemeral_1h_input_tokens":100},"output_tokens":1}',
            '{"input_tokens":0,"cache_read_input_tokens":0,"cache_creation_input_tokens":0,"output_tokens":5,'
            '"server_tool_use":{"web_search_requests":1}}',
            Usage(input=2052, output=5, cached_input=1800, cache_write=248, cache_write_1h=100),
        ),
        ('{"input_tokens":15,"output_tokens":1}', "[]", None),
        ('"?"', '{"output_tokens":5}', Usage(output=5)),
    ],
)
def test_anthropic_s_counts_only_grow(started: str, ended: str, expected: Usage | None) -> None:
    assert usage_of(anthropic(started, ended)) == expected


def test_usage_in_anthropic_message_start_is_not_yet_a_report() -> None:
    parts = anthropic('{"input_tokens":15,"output_tokens":1}', "null")
    assert [type(part) for part in parts if isinstance(part, UsageBegun | UsagePart)] == [UsageBegun]


def test_cohere_s_usage_is_read_leniently() -> None:
    ended = (
        '{"type":"message-end","delta":{"finish_reason":"COMPLETE","usage":'
        '{"billed_units":{"input_tokens":"5","output_tokens":17.0},"tokens":{"input_tokens":510.0,"output_tokens":null}}}}'
    )
    text = '{"type":"content-delta","index":0,"delta":{"message":{"content":{"text":"Hi"}}}}'
    expected = Usage(input=510, output=17, billed_input=5, billed_output=17)
    assert usage_of(fed(text, ended, dialect="cohere")) == expected
