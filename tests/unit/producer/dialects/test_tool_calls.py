"""Test the tool calls of a stream of fragments."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.events import ToolCall
from services.producer.core.dialects.tool_calls import CALLS, ToolCalls

Fragment = dict[str, Any]
Said = tuple[str | None, str | None, str]
A, B = '{"city": "A"}', '{"city": "B"}'


def joined(fragments: list[ToolCall]) -> list[Said]:
    """Return id, name and arguments of each call, which must be numbered from 0 as they begin."""
    calls: list[list[Any]] = []
    for fragment in fragments:
        if fragment.index == len(calls):
            calls.append([None, None, ""])
        call = calls[fragment.index]
        assert fragment.id is None or call[0] is None, "an id is given out once"
        assert fragment.name is None or call[1] is None, "a name is given out once"
        call[0], call[1] = call[0] or fragment.id, call[1] or fragment.name
        call[2] += fragment.arguments
    return [(call[0], call[1], call[2]) for call in calls]


def read(*fragments: Fragment, end: bool = True) -> list[Said]:
    calls = ToolCalls()
    taken: list[ToolCall] = []
    for f in fragments:
        taken += calls.take(
            0, f.get("index"), f.get("id"), f.get("name"), f.get("arguments"), beside=f.get("beside", False)
        )
    if end:
        taken += calls.end_all(0)
    return joined(taken)


@pytest.mark.parametrize("index", [{"index": 0}, {}, {"index": -1}, {"index": None}, {"index": "0"}, {"index": 0.0}])
def test_a_new_id_begins_a_new_call(index: Fragment) -> None:
    said = read(
        {**index, "id": "a", "name": "get_weather", "arguments": A},
        {**index, "id": "b", "name": "get_weather", "arguments": B},
    )
    assert said == [("a", "get_weather", A), ("b", "get_weather", B)]


@pytest.mark.parametrize("index", [{"index": 0}, {}])
def test_a_new_name_begins_a_new_call_where_ids_are_missing_or_empty(index: Fragment) -> None:
    said = read(
        {**index, "id": "", "name": "f"},
        {**index, "id": "", "name": "", "arguments": "{}"},
        {**index, "id": None, "name": "g", "arguments": "{"},
        {**index, "arguments": "}"},
    )
    assert said == [(None, "f", "{}"), (None, "g", "{}")]


@pytest.mark.parametrize("cut", range(len(A + B) + 1))
def test_an_object_behind_complete_arguments_begins_a_new_call_of_the_same_function(cut: int) -> None:
    both = A + B
    said = read({"index": 0, "name": "f", "arguments": both[:cut]}, {"index": 0, "arguments": both[cut:]})
    assert said == [(None, "f", A), (None, "f", B)]


def test_calls_of_one_function_without_id_and_index_are_separated_by_their_json_objects() -> None:
    said = read({"name": "f", "arguments": A}, {"name": "f", "arguments": B}, {"name": "f", "arguments": B})
    assert said == [(None, "f", A), (None, "f", B), (None, "f", B)]


def test_calls_in_one_list_are_separate() -> None:
    assert read({"name": "f", "arguments": ""}, {"name": "f", "arguments": "", "beside": True}) == [
        (None, "f", "{}"),
        (None, "f", "{}"),
    ]


def test_parallel_calls_with_proper_indexes_stay_apart_in_any_order() -> None:
    said = read(
        {"index": 0, "id": "a", "name": "f", "arguments": ""},
        {"index": 1, "id": "b", "name": "f", "arguments": ""},
        {"index": 1, "arguments": '{"x":'},
        {"index": 0, "arguments": '{"y":'},
        {"index": 1, "arguments": "1}"},
        {"index": 0, "arguments": "2}"},
    )
    assert said == [("a", "f", '{"y":2}'), ("b", "f", '{"x":1}')]


def test_id_and_name_on_every_fragment_are_one_call() -> None:
    said = read(*({"index": 0, "id": "a", "name": "get_weather", "arguments": c} for c in A))
    assert said == [("a", "get_weather", A)]


def test_mixed_fragments_without_a_usable_index_are_joined_by_their_ids() -> None:
    said = read(
        {"index": 0, "id": "a", "name": "f", "arguments": '{"x":'},
        {"index": 0, "id": "b", "name": "g", "arguments": '{"y":'},
        {"index": 0, "id": "a", "arguments": "1}"},
        {"index": 0, "id": "b", "arguments": "2}"},
    )
    assert said == [("a", "f", '{"x":1}'), ("b", "g", '{"y":2}')]


def test_a_fragment_without_an_id_belongs_to_the_call_that_began_last() -> None:
    said = read(
        {"index": 0, "id": "a", "name": "f", "arguments": A},
        {"index": 0, "id": "b", "name": "f", "arguments": '{"ci'},
        {"index": 0, "arguments": 'ty": "B"}'},
    )
    assert said == [("a", "f", A), ("b", "f", B)]


def test_fragments_with_a_late_or_changing_id_belong_to_the_same_call() -> None:
    assert read({"index": 0, "name": "f"}, {"index": 0, "id": "a", "arguments": A}) == [("a", "f", A)]
    changing = [{"index": 0, "id": f"chunk-{n}", "arguments": c} for n, c in enumerate(A)]
    assert read({"index": 0, "id": "x", "name": "f", "arguments": "{"}, *changing[1:]) == [("x", "f", A)]


def test_a_call_that_is_sent_again_as_a_whole_is_one_call() -> None:
    fragments = [{"index": 0, "id": "a", "name": "f", "arguments": c} for c in A]
    assert read(*fragments, {"index": 0, "id": "a", "name": "f", "arguments": A}) == [("a", "f", A)]


def test_arguments_that_are_an_object_are_its_json() -> None:
    assert read({"index": 0, "id": "a", "name": "f", "arguments": {"city": "A"}}) == [("a", "f", '{"city":"A"}')]


@pytest.mark.parametrize("nothing", ["", None, {}])
def test_no_arguments_are_an_empty_object_at_the_end(nothing: Any) -> None:
    assert read({"index": 0, "id": "a", "name": "f", "arguments": nothing}) == [("a", "f", "{}")]


def test_a_call_that_was_cut_off_gets_no_arguments() -> None:
    calls = ToolCalls()
    taken = calls.take(0, 0, "a", "f", "")
    calls.abandon(0)
    assert joined([*taken, *calls.end_all(0)]) == [("a", "f", "")]


def test_choices_number_their_calls_on_their_own() -> None:
    calls = ToolCalls()
    taken = [f for choice in (0, 1) for f in calls.take(choice, 0, f"c{choice}", "f", "{}")]
    assert [fragment.index for fragment in taken] == [0, 0]


def test_braces_and_quotes_within_texts_do_not_end_an_object() -> None:
    tricky = msgspec.json.encode({"a": '}{"\\', "b": [{"c": "\\\\"}]}).decode()
    for cut in range(len(tricky) + 1):
        said = read({"index": 0, "name": "f", "arguments": tricky[:cut]}, {"index": 0, "arguments": tricky[cut:]})
        assert said == [(None, "f", tricky)], cut


def test_calls_are_bounded() -> None:
    calls = ToolCalls()
    for n in range(CALLS):
        assert len(calls.take(0, n, f"c{n}", "f", "{}")) == 1
    with pytest.raises(ValueError, match=str(CALLS)):
        calls.take(1, 0, "one more", "f", "{}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('ab{}[]"\\, é', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('k{}"', max_size=2), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_calls_under_one_index_are_reassembled_from_any_fragments(data: st.DataObject) -> None:
    objects = data.draw(st.lists(st.dictionaries(st.text("xy", max_size=2), JSON, max_size=3), min_size=1, max_size=4))
    with_ids, repeats = data.draw(st.booleans()), data.draw(st.booleans())
    fragments: list[Fragment] = []
    wanted: list[Said] = []
    for n, value in enumerate(objects):
        text = msgspec.json.encode(value).decode()
        cuts = sorted(data.draw(st.sets(st.integers(1, len(text)), max_size=4)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        head = {"index": 0, "id": f"c{n}" if with_ids else None, "name": "f"}
        fragments += [{**(head if repeats or not k else {"index": 0}), "arguments": p} for k, p in enumerate(pieces)]
        wanted.append((f"c{n}" if with_ids else None, "f", text))
    assert read(*fragments) == wanted
