"""The scripted provider's answers."""

import math
from typing import Any

import msgspec
import pytest
import toktok
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.requests import Message
from schemas.usage import Usage
from services.producer.core.counting import count_input
from services.producer.core.dialects.joined import join
from services.producer.core.parts import End, Finish, Part, Reasoning, Text, ToolCallPart, UpstreamFailure, UsagePart
from services.producer.core.prose import pieces
from services.producer.core.script import ENCODING, MODELS, play, refusal
from services.producer.ports import UpstreamRequest

QUESTION = [Message("user", "Why do rivers bend?")]
TALKING = [m for m in MODELS if m not in ("refuse", "stall", "cutoff", "error")]


def call(model: str, messages: list[Message] = QUESTION, **params: Any) -> UpstreamRequest:
    return UpstreamRequest(model=model, messages=messages, params=params)


def parts_of(asked: UpstreamRequest) -> list[Part]:
    return [part for _, parts in play(asked) for part in parts]


def text_of(parts: list[Part]) -> str:
    return "".join(p.text for p in parts if isinstance(p, Text))


def usage_of(parts: list[Part]) -> Usage:
    [usage] = [p.usage for p in parts if isinstance(p, UsagePart)]
    return usage


def counted(text: str) -> int:
    return int(toktok.batch_count([text], ENCODING)[0])


@pytest.mark.parametrize("model", TALKING)
def test_the_same_call_gives_the_same_answer(model: str) -> None:
    assert list(play(call(model))) == list(play(call(model)))


def test_another_question_gives_another_answer_that_names_it() -> None:
    one, two = (text_of(parts_of(call("story", [Message("user", q)]))) for q in ("What is {a} bridge?", "Tea"))
    assert one != two
    assert "What is {a} bridge" in one
    assert "Tea" in two


@pytest.mark.parametrize("model", TALKING)
def test_an_answer_ends_with_its_end_marker(model: str) -> None:
    parts = parts_of(call(model))
    assert parts[-1] == End()
    assert [p.reason for p in parts if isinstance(p, Finish)] == ["tool_calls" if model == "tools" else "stop"]


@pytest.mark.parametrize("model", ["story", "json", "megabyte"])
def test_reported_usage_is_the_exact_count_of_the_text(model: str) -> None:
    parts = parts_of(call(model))
    asked, _ = count_input(QUESTION, {}, ENCODING)
    assert usage_of(parts) == Usage(input=asked, output=counted(text_of(parts)))


def test_each_tool_call_is_counted_by_itself() -> None:
    parts = parts_of(call("tools"))
    calls = [p.tool_call for p in join(parts) if isinstance(p, ToolCallPart)]
    assert usage_of(parts).output == sum(counted((c.name or "") + c.arguments) for c in calls)


def test_reasoning_is_counted_in_output_and_apart() -> None:
    parts = parts_of(call("reasoning"))
    reasoning = counted("".join(p.text for p in parts if isinstance(p, Reasoning)))
    assert reasoning > 10
    assert usage_of(parts).reasoning == reasoning
    assert usage_of(parts).output == reasoning + counted(text_of(parts))


@pytest.mark.parametrize("tokens", [0, 1, 7, 250, 5000])
def test_the_number_of_tokens_can_be_requested(tokens: int) -> None:
    assert usage_of(parts_of(call("story", tokens=tokens))).output == pytest.approx(tokens, abs=2)


def test_the_average_rate_is_the_requested_one_with_jitter() -> None:
    delays = [delay for delay, _ in play(call("story", tokens=400, tokens_per_second=100))][1:-1]
    assert sum(delays) / len(delays) == pytest.approx(0.01, rel=0.1)
    assert len(set(delays)) > len(delays) / 2
    assert {delay for delay, _ in play(call("story", tokens_per_second=0))} == {0.0}


def test_json_is_json() -> None:
    assert msgspec.json.decode(text_of(parts_of(call("json"))))["topic"] == "Why do rivers bend"


def test_tools_model_calls_the_offered_function() -> None:
    offered = [{"type": "function", "function": {"name": "look_up"}}]
    calls = [p.tool_call for p in join(parts_of(call("tools", tools=offered))) if isinstance(p, ToolCallPart)]
    assert [(c.index, c.name) for c in calls] == [(0, "look_up"), (1, "look_up")]
    assert all(msgspec.json.decode(c.arguments)["query"].startswith("Why do rivers bend") for c in calls)


def test_a_megabyte_is_a_megabyte() -> None:
    assert len(text_of(parts_of(call("megabyte")))) == 1_000_000


def test_no_usage_reports_none() -> None:
    assert not [p for p in parts_of(call("no-usage")) if isinstance(p, UsagePart)]


def test_stall_never_sends_another_part() -> None:
    steps = list(play(call("stall", stall_after=3)))
    assert [len(parts) for _, parts in steps] == [1, 1, 1, 1, 0]
    assert math.isinf(steps[-1][0])


def test_cutoff_ends_without_end_marker() -> None:
    parts = parts_of(call("cutoff", cutoff_after=3))
    assert [type(p).__name__ for p in parts] == ["Identity", "Text", "Text", "Text"]


def test_error_fails_in_the_middle() -> None:
    parts = parts_of(call("story", error_after=3))
    assert isinstance(parts[-1], UpstreamFailure)
    assert parts[-1].recoverable
    assert len(parts) == 5


def test_refuse_model_refuses_and_unknown_models_are_not_found() -> None:
    refused, unknown = refusal(call("refuse")), refusal(call("opera"))
    assert refused is not None
    assert (refused.code, refused.upstream_status, refused.recoverable) == ("upstream_rate_limited", 429, True)
    assert unknown is not None
    assert unknown.code == "upstream_not_found"
    assert all(refusal(call(m)) is None for m in MODELS if m != "refuse")


@pytest.mark.parametrize("value", ["fast", None, -1, True, [], 1e300, float("nan")])
def test_parameters_that_are_no_sensible_number_are_ignored(value: Any) -> None:
    plain = list(play(call("story")))
    assert list(play(call("story", tokens=value, tokens_per_second=value, stall_after=value))) == plain


@settings(max_examples=50, deadline=None)
@given(question=st.text(max_size=300))
def test_any_question_is_answered(question: str) -> None:
    parts = parts_of(call("story", [Message("user", question)], tokens=50))
    assert parts[-1] == End()
    assert counted(text_of(parts)) == usage_of(parts).output


@given(text=st.text(max_size=200))
def test_pieces_join_to_the_text(text: str) -> None:
    assert "".join(pieces(text)) == text
