"""Frames: made once, joined for whoever stands at the same place; and as an independent parser reads them."""

import msgspec
from httpx_sse._decoders import SSEDecoder, SSELineDecoder
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import encode_event
from schemas.events import Delta
from services.delivery.core import sse
from services.delivery.core.entries import Entry, Tail
from services.delivery.core.frames import Frames

json_text = st.text(max_size=60) | st.sampled_from(["\n", "\r\n\r\n", "\u2028data: x", "id: 5\n", "\x85", "\0", ""])


def plain(entry: Entry, prefix: bytes) -> bytes:
    return b"%b%d;" % (prefix, entry.seq)


def tail_of(*entries: tuple[str, str], max_bytes: int = 10_000) -> Tail:
    tail = Tail(0, max_bytes)
    for seq, (generation, type_) in enumerate(entries, 1):
        tail.append(Entry(seq, generation, type_, b"x" * 10))
    return tail


def parse(chunks: list[bytes]) -> list[tuple[str, str, str]]:
    """What an independent parser makes of a stream, however it is cut."""
    lines, decoder, events = SSELineDecoder(), SSEDecoder(), []
    text = b"".join(chunks).decode()
    for line in [*lines.decode(text), *lines.flush()]:
        event = decoder.decode(line)
        if event is not None and event.data:
            events.append((event.id, event.event, event.data))
    return events


@given(st.lists(json_text, max_size=10))
def test_framed_events_are_read_back_as_they_were_stored(texts: list[str]) -> None:
    stored = [
        encode_event(Delta(generation="g", seq=n, text=text.encode("utf-8", "replace").decode()))
        for n, text in enumerate(texts)
    ]
    frames = [sse.frame(Entry(n + 1, "g", "delta", data), b"t1") for n, data in enumerate(stored)]
    events = parse([sse.retry_frame(1_000), *frames[:3], sse.HEARTBEAT, *frames[3:]])
    assert [data for _, _, data in events] == [data.decode() for data in stored]
    assert [id_ for id_, _, _ in events] == [f"t1{n + 1:012x}" for n in range(len(stored))]
    assert {event for _, event, _ in events} <= {"message"}


@given(json_text, json_text)
def test_control_events_carry_their_fields_and_move_no_position(reason: str, cursor: str) -> None:
    fields = {
        "reason": reason.encode("utf-8", "replace").decode(),
        "cursor": cursor.encode("utf-8", "replace").decode(),
    }
    before = sse.frame(Entry(7, "g", "delta", b"{}"), b"t1")
    events = parse([before, sse.control_frame("bye", fields)])
    assert events[1][1] == "bye"
    assert msgspec.json.decode(events[1][2]) == fields
    assert events[1][0] == events[0][0]  # the last id stays that of the last event
    assert b"id:" not in sse.control_frame("bye", {"reason": "drain"})


def test_gap_names_what_is_missing_and_of_what() -> None:
    assert parse([sse.gap_frame("beginning_expired", "g1")]) == [
        ("", "gap", '{"reason":"beginning_expired","generation":"g1"}')
    ]
    assert parse([sse.gap_frame("log_recreated")]) == [("", "gap", '{"reason":"log_recreated"}')]


def test_chunk_joins_everything_that_was_missed() -> None:
    chunk = Frames(tail_of(*[("a", "delta")] * 5), plain, b"p").chunk(2, None, 1_000)
    assert (chunk.data, chunk.count, chunk.stop, chunk.last_seq, chunk.ends) == (b"p3;p4;p5;", 3, 5, 5, False)
    assert chunk.message == {"type": "http.response.body", "body": chunk.data, "more_body": True}


def test_chunk_ends_behind_its_bound_and_the_next_goes_on() -> None:
    frames = Frames(tail_of(*[("a", "delta")] * 5), plain, b"p")
    first = frames.chunk(0, None, 6)
    assert (first.data, first.stop) == (b"p1;p2;", 2)
    assert frames.chunk(first.stop, None, 1_000).data == b"p3;p4;p5;"


def test_chunk_of_a_generation_skips_the_others_and_ends_with_its_terminal() -> None:
    tail = tail_of(("a", "started"), ("b", "started"), ("a", "completed"), ("b", "delta"), ("a", "usage"))
    frames = Frames(tail, plain, b"")
    chunk = frames.chunk(0, "a", 1_000)
    assert (chunk.data, chunk.stop, chunk.ends) == (b"1;3;", 3, True)
    assert chunk.message["more_body"] is False
    other = frames.chunk(0, "b", 1_000)
    assert (other.data, other.stop, other.last_seq, other.ends) == (b"2;4;", 5, 5, False)


def test_chunk_without_events_of_the_wanted_generation_still_moves_on() -> None:
    chunk = Frames(tail_of(("a", "delta"), ("a", "delta")), plain, b"").chunk(0, "b", 1_000)
    assert (chunk.count, chunk.data, chunk.stop, chunk.last_seq) == (0, b"", 2, 2)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=120), st.integers(10, 200), st.data())
def test_frames_follow_a_tail_that_forgets_and_are_made_at_most_once(
    sizes: list[int], max_bytes: int, data: st.DataObject
) -> None:
    made: list[int] = []

    def counting(entry: Entry, prefix: bytes) -> bytes:
        made.append(entry.seq)
        return plain(entry, prefix)

    tail = Tail(0, max_bytes)
    frames = Frames(tail, counting, b"")
    for seq, size in enumerate(sizes, 1):
        tail.append(Entry(seq, "g", "delta", b"x" * size))
        if data.draw(st.booleans()):
            start = data.draw(st.integers(tail.base, tail.end))
            expected = b"".join(plain(entry, b"") for entry in tail.slice(start, tail.end))
            assert frames.chunk(start, None, 1_000_000).data == expected
    assert len(made) == len(set(made))
