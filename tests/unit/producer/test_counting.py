"""The running count of a growing text, and the count of a request."""

from itertools import pairwise

import pytest
import toktok
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas.requests import Message
from services.producer.core import counting
from services.producer.core.counting import GenerationCounter, TokenCounter, count_input, count_text, encoding_of

ENCODINGS = ("cl100k_base", "o200k_base", "o200k_harmony")

# Pieces that meet in every way the encodings' patterns look at: contractions, cases, digits, marks, white space.
# ruff: noqa: RUF001 - look-alikes of ASCII are what is tested here
WORDS = (
    "a Z don't I'LL we've 'S 's ’s ſs 1 12 345 2024 ½ Ⅷ ٣ . , ... !? // /* _ - \" ' ) :( </ {} <|endoftext|> aGVsbG8x"
)
SCRIPTS = (
    "水 漢字 かな カナ 한국어 。 、 ， ！ e\u0301 \u0301 ÄÖ ß ǅ ʰ Привет "
    "👍 👩\u200d👩\u200d👧 \ufe0f 🇩🇪 \u0bcd नमस्ते สวัสดี"
)
SPACES = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\r",
    "\n\n",
    " \n ",
    "\u00a0",
    "\u2028",
    "\u3000",
    "\x1c",
    "\x0b",
    "\x00",
]
PIECES = st.sampled_from([*WORDS.split(), *SCRIPTS.split(), *SPACES])
TEXTS = st.lists(PIECES | st.characters(exclude_categories=("Cs",)), max_size=40).map("".join)


def whole(text: str, encoding: str) -> int:
    """The count of a finished text, by another function of the library."""
    return int(toktok.batch_count([text], encoding, threads=1)[0])


def chunks(text: str, cuts: list[int]) -> list[str]:
    at = sorted({c % (len(text) + 1) for c in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(at)]


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 1_000), max_size=30))
@example(text="ab 'll x", cuts=[3, 4])
@example(text="word \n\n next", cuts=list(range(12)))
@example(text="x!\r\n\r\n/y", cuts=list(range(9)))
def test_total_is_the_count_of_the_whole_text_under_any_chunking(encoding: str, text: str, cuts: list[int]) -> None:
    counter = TokenCounter(encoding, True)
    for chunk in chunks(text, cuts):
        counter.add(chunk)
    assert counter.total() == whole(text, encoding)
    assert counter.count == counter.total()


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(deadline=None)
@given(text=TEXTS)
def test_text_before_a_safe_cut_has_the_same_count_with_any_continuation(encoding: str, text: str) -> None:
    for end in range(1, len(text) + 1):
        cut = counting._last_safe(text[: end - 1][-1:], text[end - 1 : end])
        if cut == 0:
            head, tail = text[: end - 1], text[end - 1 :]
            assert count_text(head, encoding) + count_text(tail, encoding) == count_text(text, encoding)


@settings(deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 1_000), max_size=30))
def test_the_running_count_of_a_short_tail_is_exact(text: str, cuts: list[int]) -> None:
    counter, so_far = TokenCounter("o200k_base", True), ""
    for chunk in chunks(text[:200], cuts):
        so_far += chunk
        assert counter.add(chunk) == count_text(so_far, "o200k_base")


@pytest.mark.parametrize("unit", ["水火木金土", "👍🏽", "QmFzZQ", "\n", "   ", "ab", "====", "\u0301"])
def test_a_tail_without_a_safe_cut_is_recounted_in_proportion(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    characters = 0
    counted = counting.count_text

    def counting_work(text: str, encoding: str) -> int:
        nonlocal characters
        characters += len(text)
        return counted(text, encoding)

    monkeypatch.setattr(counting, "count_text", counting_work)
    text = unit * (20_000 // len(unit))
    counter = TokenCounter("o200k_base", True)
    lag = 0
    for start in range(0, len(text), 7):
        running = counter.add(text[start : start + 7])
        lag = max(lag, abs(running - counted(text[: start + 7], "o200k_base")) if start % 700 == 0 else 0)
    assert counter.total() == counted(text, "o200k_base")
    assert characters < 40 * len(text)
    assert lag <= counter.total() / 8 + 32


def test_words_are_settled_so_that_only_the_last_one_is_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    counted = counting.count_text

    def counting_work(text: str, encoding: str) -> int:
        nonlocal longest
        longest = max(longest, len(text))
        return counted(text, encoding)

    monkeypatch.setattr(counting, "count_text", counting_work)
    counter = TokenCounter("o200k_base", True)
    for _ in range(500):
        counter.add(" quick")
        counter.add(" brown fox")
    assert counter.total() == 1_500
    assert longest < 40


def test_an_empty_chunk_changes_nothing() -> None:
    counter = TokenCounter("o200k_base", False)
    assert [counter.add(""), counter.total(), counter.add("hello"), counter.add("")] == [0, 0, 1, 1]


def test_half_a_surrogate_pair_is_counted_and_not_an_error() -> None:
    assert TokenCounter("o200k_base", True).add("\ud83d") >= 1


def test_special_tokens_in_text_count_as_the_text_they_are() -> None:
    assert count_text("<|endoftext|>", "o200k_base") > 1


def test_an_unknown_encoding_is_an_error() -> None:
    with pytest.raises(KeyError):
        count_text("x", "no_such_base")


def test_lanes_are_counted_apart() -> None:
    counter = GenerationCounter("o200k_base", True)
    counter.add("text", 0, 0, "hel")
    counter.add("reasoning", 0, 0, "lo")
    counter.add("text", 1, 0, "hello")
    counter.add("arguments", 0, 1, '{"a":')
    running = counter.add("text", 0, 0, "lo")
    assert running == counter.count == counter.total()
    assert counter.total() == sum(count_text(t, "o200k_base") for t in ("hello", "lo", "hello", '{"a":'))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["text", "reasoning"]), st.integers(0, 2), TEXTS), max_size=12))
def test_the_generation_total_is_the_sum_of_each_lane_joined(parts: list[tuple[str, int, str]]) -> None:
    counter, joined = GenerationCounter("cl100k_base", True), dict[tuple[str, int], str]()
    for kind, choice, text in parts:
        counter.add(kind, choice, 0, text)
        joined[kind, choice] = joined.get((kind, choice), "") + text
    assert counter.total() == sum(count_text(text, "cl100k_base") for text in joined.values())


@pytest.mark.parametrize(
    ("model", "encoding", "exact"),
    [
        ("gpt-4o-mini", "o200k_base", True),
        ("openai/gpt-4o", "o200k_base", True),
        ("openrouter/openai/gpt-4.1-nano", "o200k_base", True),
        ("gpt-5", "o200k_base", True),
        ("o1", "o200k_base", True),
        ("o3-mini", "o200k_base", True),
        ("o4-mini-2025-04-16", "o200k_base", True),
        ("chatgpt-4o-latest", "o200k_base", True),
        ("gpt-4.5-preview", "o200k_base", True),
        ("ft:gpt-4o-mini-2024-07-18:org::id", "o200k_base", True),
        ("gpt-4", "cl100k_base", True),
        ("gpt-4-turbo", "cl100k_base", True),
        ("gpt-3.5-turbo-0125", "cl100k_base", True),
        ("openai/gpt-oss-20b:free", "o200k_harmony", True),
        ("claude-sonnet-4-5", "o200k_base", False),
        ("o1js", "o200k_base", False),
        ("o365", "o200k_base", False),
        ("gpt-4all", "o200k_base", False),
        ("scripted/story", "o200k_base", False),
        ("", "o200k_base", False),
    ],
)
def test_encoding_of_a_model(model: str, encoding: str, exact: bool) -> None:
    assert encoding_of(model) == (encoding, exact)


# Published examples of the accounting, with the prompt_tokens that the API returned (OpenAI cookbook,
# "How to count tokens with tiktoken").
COOKBOOK = [
    Message(
        "system", "You are a helpful, pattern-following assistant that translates corporate jargon into plain English."
    ),
    Message("system", "New synergies will help drive top-line growth.", name="example_user"),
    Message("system", "Things working well together will increase revenue.", name="example_assistant"),
    Message(
        "system",
        "Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage.",
        name="example_user",
    ),
    Message("system", "Let's talk later when we're less busy about how to do better.", name="example_assistant"),
    Message(
        "user",
        "This late pivot means we don't have time to boil the ocean for the client deliverable.",
    ),
]


@pytest.mark.parametrize(("encoding", "tokens"), [("cl100k_base", 129), ("o200k_base", 124)])
def test_input_is_counted_as_the_provider_reports_it(encoding: str, tokens: int) -> None:
    assert count_input(COOKBOOK, {"temperature": 0}, encoding) == (tokens, True)


@pytest.mark.parametrize("params", [{"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}])
def test_input_with_tools_or_formats_is_an_estimate(params: dict[str, object]) -> None:
    plain, _ = count_input(COOKBOOK, {}, "o200k_base")
    count, exact = count_input(COOKBOOK, params, "o200k_base")
    assert count > plain
    assert not exact


def test_input_with_parts_counts_the_text_and_is_an_estimate_when_a_part_is_not_text() -> None:
    text = {"type": "text", "text": "hello"}
    plain = count_input([Message("user", "hello")], {}, "o200k_base")
    assert count_input([Message("user", [text])], {}, "o200k_base") == plain
    assert count_input([Message("user", [text, {"type": "image_url"}])], {}, "o200k_base") == (plain[0], False)
    assert count_input([Message("user", [{"type": "text", "text": 7}])], {}, "o200k_base")[1] is False


def test_input_with_reasoning_and_refusals_counts_their_text_as_an_estimate() -> None:
    plain = count_input([Message("assistant", "hello")], {}, "o200k_base")
    for field in ("refusal", "reasoning_content", "reasoning", "tool_plan"):
        message = Message("assistant", None, **{field: "hello"})
        assert count_input([message], {}, "o200k_base") == (plain[0], False)


def test_input_with_tool_calls_is_an_estimate() -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert count_input([Message("assistant", None, tool_calls=calls)], {}, "o200k_base")[1] is False
    assert count_input([], {}, "o200k_base") == (3, True)
