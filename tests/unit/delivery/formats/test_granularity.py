"""Test granularities: no text is lost or repeated when resuming at any cursor in any granularity."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.acceptance import BEGINNING
from schemas.acceptance import Position as Accepted
from schemas.codec import encode_event
from schemas.events import Completed, Delta, Extra, Started, ToolCall
from services.delivery.formats.format import Address
from services.delivery.formats.granularity import (
    CUTS,
    HOLD_CHARS,
    TOKEN,
    Chunker,
    Granularity,
    Position,
    parse_granularity,
    rest,
)
from services.delivery.formats.tail import Entry, Tail

START = Position(0)
GRAINS = [TOKEN, Granularity("line"), Granularity("sentence"), Granularity("coalesce", 0.05)]
TEXTS = st.text(st.sampled_from("ab .!?\n\"'。\uff01」…3中é\U0001f600"), max_size=12)
KINDS = ["reasoning", "refusal", "tool", "extra", "other", "choice", "moved"]
SAID = st.lists(
    st.tuples(st.sampled_from(["text"] * 4 + KINDS), TEXTS),
    max_size=30,
)


def entries_of(said: list[tuple[str, str]], step: int = 3) -> list[Entry]:
    """Return the log of a generation with these texts, with holes in its stream sequences."""
    events: list[Any] = [Started(generation="g", seq=0, model="m", provider="p", upstream_model="u")]
    for seq, (kind, text) in enumerate(said, 1):
        match kind:
            case "reasoning":
                events.append(Delta(generation="g", seq=seq, reasoning=text, tokens=seq))
            case "refusal":
                events.append(Delta(generation="g", seq=seq, refusal=text, tokens=seq))
            case "extra":
                events.append(Delta(generation="g", seq=seq, extra=Extra(kind="k", data=text), tokens=seq))
            case "tool":
                events.append(Delta(generation="g", seq=seq, tool_call=ToolCall(arguments=text), tokens=seq))
            case "other":
                events.append(Delta(generation="h", seq=seq, text=text, tokens=seq))
            case "choice":
                events.append(Delta(generation="g", seq=seq, text=text, choice=1, tokens=seq))
            case _:
                events.append(Delta(generation="g", seq=seq, text=text, tokens=seq))
    events.append(Completed(generation="g", seq=len(said) + 1, finish_reason="stop"))
    kinds = ["", *(kind for kind, _ in said), ""]
    return [
        Entry(n * step, e.generation, json.loads(encode_event(e))["type"], encode_event(e), 0, kind == "moved")
        for n, (e, kind) in enumerate(zip(events, kinds, strict=True), 1)
    ]


def shown(
    entries: list[Entry], grain: Granularity, place: Position = START, pauses: frozenset[int] = frozenset()
) -> list[Entry]:
    """Return what is shown of a log behind a place; time passes at ``pauses``."""
    chunker, out, now = Chunker(grain, place), [], 0.0
    for number, entry in enumerate(e for e in entries if e.seq > place.seq):
        out += chunker.offer(entry, now)
        if number in pauses:
            now += 10.0
        out += chunker.settle(now)
    return out + chunker.release()


def place_of(entry: Entry) -> Position:
    return Position(entry.seq, entry.offset)


def content(entries: list[Entry]) -> list[tuple[str, str]]:
    """Return the kinds and texts in the order of the log, adjacent ones joined."""
    found: list[tuple[str, str]] = []
    for entry in entries:
        event = json.loads(entry.data)
        kind = next((kind for kind in ("text", "reasoning", "refusal") if kind in event), "")
        text = event.get(kind)
        if text is None:
            found.append((entry.data.decode(), ""))
            continue
        who = f"{event['generation']}/{event.get('choice', 0)}/{kind}"
        if found and found[-1][0] == who:
            found[-1] = (who, found[-1][1] + text)
        elif text:
            found.append((who, text))
    return found


@given(SAID, st.sampled_from(GRAINS), st.frozensets(st.integers(0, 30)))
def test_text_is_the_same_in_every_granularity(
    said: list[tuple[str, str]], grain: Granularity, pauses: frozenset[int]
) -> None:
    entries = entries_of(said)
    assert content(shown(entries, grain, pauses=pauses)) == content(entries)


@given(SAID, st.lists(st.sampled_from(GRAINS), min_size=2, max_size=6), st.data())
def test_resume_from_any_cursor_in_any_granularity_returns_every_character_once(
    said: list[tuple[str, str]], grains: list[Granularity], data: st.DataObject
) -> None:
    entries = entries_of(said)
    seen: list[Entry] = []
    place = Position(0)
    for grain in grains:
        pieces = shown(entries, grain, place, data.draw(st.frozensets(st.integers(0, 30))))
        if not pieces:
            break
        taken = pieces[: data.draw(st.integers(0, len(pieces)))]
        seen += taken
        place = place_of(taken[-1]) if taken else place
    seen += shown(entries, TOKEN, place)
    assert content(seen) == content(entries)


@given(SAID, st.sampled_from(GRAINS[1:]), st.frozensets(st.integers(0, 30)), st.data())
def test_resume_inside_a_piece_continues_with_its_rest(
    said: list[tuple[str, str]], grain: Granularity, pauses: frozenset[int], data: st.DataObject
) -> None:
    entries = entries_of(said)
    other = shown(entries, data.draw(st.sampled_from(GRAINS)), pauses=data.draw(st.frozensets(st.integers(0, 30))))
    taken = other[: data.draw(st.integers(0, len(other)))]
    place = place_of(taken[-1]) if taken else Position(0)
    pieces, log = Tail(0, 1_000_000), Tail(0, 1_000_000)
    for entry in entries:
        log.append(entry)
    for entry in shown(entries, grain, pauses=pauses):
        pieces.append(entry)
    index = pieces.after(*place)
    later = pieces.slice(index, pieces.end)
    if later and later[0].type == "delta":
        first = later[0]
        covered = log.slice(log.after(place.seq), log.after(first.seq) + (first.offset > 0))
        left = rest(covered, place, place_of(first))
        later[0] = left if left is not None else first
    assert content([*taken, *later]) == content(entries)


@given(SAID, st.sampled_from(GRAINS), st.frozensets(st.integers(0, 30)))
def test_positions_only_increase_and_cursors_sort_as_text(
    said: list[tuple[str, str]], grain: Granularity, pauses: frozenset[int]
) -> None:
    pieces = shown(entries_of(said), grain, pauses=pauses)
    places = [place_of(piece) for piece in pieces]
    assert places == sorted(set(places))
    cursors = [Address("s", b"t1").after(piece) for piece in pieces]
    assert cursors == sorted(cursors)


@given(SAID, st.sampled_from(GRAINS), st.frozensets(st.integers(0, 30)))
def test_joined_deltas_with_through_satisfy_the_acceptance_rule(
    said: list[tuple[str, str]], grain: Granularity, pauses: frozenset[int]
) -> None:
    said = [(kind, text) for kind, text in said if kind != "other"]
    position: Accepted = BEGINNING
    for piece in shown(entries_of(said), grain, pauses=pauses):
        event = json.loads(piece.data)
        assert event["seq"] == position.next_seq
        position = position._replace(next_seq=event.get("through", event["seq"]) + 1)
    assert position.next_seq == len(said) + 2


@given(SAID)
def test_token_is_the_log_byte_for_byte(said: list[tuple[str, str]]) -> None:
    entries = entries_of(said)
    assert shown(entries, TOKEN) == entries


def lines(grain: Granularity, *said: str) -> list[str]:
    return [json.loads(e.data)["text"] for e in shown(entries_of([("text", s) for s in said]), grain)[1:-1]]


def test_lines_end_at_line_ends() -> None:
    assert lines(Granularity("line"), "one\ntw", "o\n", "\nthree") == ["one\n", "two\n", "\n", "three"]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (["One. Two", "! Three"], ["One. ", "Two! ", "Three"]),
        (["Pi is 3", ".14 exactly. ", "Yes"], ["Pi is 3.14 exactly. ", "Yes"]),
        (["He said “no.” Then"], ["He said “no.” ", "Then"]),
        (["Wait", "...", " what?! ", "So"], ["Wait... ", "what?! ", "So"]),
        (["今日は。明日", "\uff01「はい。」と"], ["今日は。", "明日\uff01", "「はい。」", "と"]),
        (["Title\n\nText. "], ["Title\n", "\nText. "]),
        (["क्या। हाँ"], ["क्या।", " हाँ"]),
    ],
)
def test_sentences_end_at_sentence_boundaries(said: list[str], wanted: list[str]) -> None:
    assert lines(Granularity("sentence"), *said) == wanted


def test_text_without_a_boundary_is_sent_when_it_is_too_long() -> None:
    pieces = lines(Granularity("line"), *["x" * 100] * 100)
    assert len(pieces) > 1
    assert max(map(len, pieces)) < HOLD_CHARS + 100


def test_text_without_an_end_is_let_out_in_time() -> None:
    chunker = Chunker(Granularity("line"), Position(0))
    _, held, *_ = entries_of([("text", "no end")])
    assert chunker.offer(held, 5.0) == []
    due = chunker.due
    assert due is not None
    assert chunker.settle(due - 0.001) == []
    assert chunker.settle(due) == [held]
    assert chunker.due is None


def test_coalesced_text_that_comes_after_a_pause_is_shown_at_once() -> None:
    chunker = Chunker(Granularity("coalesce", 0.1), Position(0))
    _, one, two, *_ = entries_of([("text", "one "), ("text", "two")])
    chunker.offer(one, 5.0)
    assert chunker.settle(5.0) == [one]
    chunker.offer(two, 5.01)
    assert chunker.settle(5.01) == []
    assert chunker.due == pytest.approx(5.1)


def test_the_number_of_pieces_of_one_event_is_bounded() -> None:
    pieces = lines(Granularity("line"), "\n" * 100_000)
    assert len(pieces) == CUTS + 1
    assert "".join(pieces) == "\n" * 100_000


def test_unreadable_delta_is_sent_unchanged_and_in_order() -> None:
    entries = entries_of([("text", "a"), ("text", "b")])
    broken = entries[2]._replace(data=b'{"type":"delta","generation":"g","seq":2,"text":7}')
    entries[2] = broken
    assert shown(entries, Granularity("coalesce", 1.0)) == entries


def test_place_behind_what_is_held_is_before_it() -> None:
    chunker = Chunker(Granularity("sentence"), Position(0))
    _, one, *_ = entries_of([("text", "Yes. And")])
    (piece,) = chunker.offer(one, 0.0)
    assert place_of(piece) == chunker.position(one.seq) == Position(one.seq - 1, 5)


@pytest.mark.parametrize(
    ("granularity", "coalesce", "wanted"),
    [
        (None, None, TOKEN),
        ("token", None, TOKEN),
        ("line", None, Granularity("line")),
        (None, 10, Granularity("coalesce", 0.01)),
        (None, 99, Granularity("coalesce", 0.05)),
        (None, 5000, Granularity("coalesce", 5.0)),
    ],
)
def test_granularity_and_coalesce_parameters_are_parsed(
    granularity: str | None, coalesce: int | None, wanted: Granularity
) -> None:
    assert parse_granularity(granularity, coalesce) == wanted


@pytest.mark.parametrize(("granularity", "coalesce"), [("word", None), ("line", 100), (None, 9), (None, 5001)])
def test_invalid_granularity_parameters_are_refused(granularity: str | None, coalesce: int | None) -> None:
    with pytest.raises(ValueError, match=r"granularity|coalesce"):
        parse_granularity(granularity, coalesce)
