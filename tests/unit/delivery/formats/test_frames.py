"""Test frames: encoded once, joined for subscribers at the same position, and read by an independent parser."""

from typing import Any

import msgspec
from httpx_sse._decoders import SSEDecoder, SSELineDecoder
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import encode_event
from schemas.events import Delta
from services.delivery.formats.format import Address
from services.delivery.formats.frames import Chunk, Frames
from services.delivery.formats.sse import SSE, ServerSentEvents, control_frame
from services.delivery.formats.tail import Entry, Tail, gap_before

json_text = st.text(max_size=60) | st.sampled_from(["\n", "\r\n\r\n", "\u2028data: x", "id: 5\n", "\x85", "\0", ""])


AT = Address("s", b"t1")


class Plain(ServerSentEvents):
    """Readable frames for tests; `made` lists the encoded ones."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def frame(self, entry: Entry, at: Address) -> bytes:
        self.made.append(entry.seq)
        return b"%d;" % entry.seq


def body(chunk: Chunk) -> bytes:
    message: Any = chunk.message
    return b"" if message is None else message["body"]


def tail_of(*entries: tuple[str, str], max_bytes: int = 10_000) -> Tail:
    tail = Tail(0, max_bytes)
    for seq, (generation, type_) in enumerate(entries, 1):
        tail.append(Entry(seq, generation, type_, b"x" * 10))
    return tail


def parse(chunks: list[bytes]) -> list[tuple[str, str, str]]:
    """Return the events that an independent parser reads, the same under every chunking."""
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
    frames = [SSE.frame(Entry(n + 1, "g", "delta", data), AT) for n, data in enumerate(stored)]
    events = parse([SSE.opening(AT), *frames[:3], SSE.heartbeat()["body"], *frames[3:]])
    assert [data for _, _, data in events] == [data.decode() for data in stored]
    assert [id_ for id_, _, _ in events] == [f"t1{n + 1:012x}" for n in range(len(stored))]
    assert {event for _, event, _ in events} <= {"message"}


@given(json_text, json_text)
def test_control_events_carry_their_fields_and_move_no_position(reason: str, cursor: str) -> None:
    fields = {
        "reason": reason.encode("utf-8", "replace").decode(),
        "cursor": cursor.encode("utf-8", "replace").decode(),
    }
    before = SSE.frame(Entry(7, "g", "delta", b"{}"), AT)
    events = parse([before, control_frame("bye", fields)])
    assert events[1][1] == "bye"
    assert msgspec.json.decode(events[1][2]) == fields
    assert events[1][0] == events[0][0]  # the last id stays that of the last event
    assert b"id:" not in control_frame("bye", {"reason": "drain"})


def test_gap_has_a_reason_and_the_generation() -> None:
    assert parse([SSE.gap("beginning_expired", "g1", AT)]) == [
        ("", "gap", '{"reason":"beginning_expired","generation":"g1"}')
    ]
    assert parse([SSE.gap("log_recreated", None, AT)]) == [("", "gap", '{"reason":"log_recreated"}')]


def test_chunk_joins_all_missed_events() -> None:
    chunk = Frames(tail_of(*[("a", "delta")] * 5), Plain(), AT).chunk(2, None, 1_000)
    assert (chunk.count, chunk.size, chunk.stop, chunk.last_seq, chunk.ends) == (3, 6, 5, 5, False)
    assert chunk.message == {"type": "http.response.body", "body": b"3;4;5;", "more_body": True}


def test_chunk_ends_at_its_size_limit_and_the_next_continues() -> None:
    frames = Frames(tail_of(*[("a", "delta")] * 5), Plain(), AT)
    first = frames.chunk(0, None, 4)
    assert (body(first), first.stop) == (b"1;2;", 2)
    assert body(frames.chunk(first.stop, None, 1_000)) == b"3;4;5;"


def test_chunk_has_no_more_events_than_the_credit() -> None:
    tail = tail_of(("a", "started"), ("b", "started"), ("b", "delta"), ("a", "delta"), ("a", "completed"))
    frames = Frames(tail, Plain(), AT)
    first = frames.chunk(0, "a", 1_000, 2)
    assert (body(first), first.stop, first.last_seq, first.ends) == (b"1;4;", 4, 4, False)
    assert (body(frames.chunk(first.stop, "a", 1_000, 2)), first.count) == (b"5;", 2)


def test_chunk_of_a_generation_skips_other_generations_and_ends_with_its_terminal() -> None:
    tail = tail_of(("a", "started"), ("b", "started"), ("a", "completed"), ("b", "delta"), ("a", "usage"))
    frames = Frames(tail, Plain(), AT)
    chunk = frames.chunk(0, "a", 1_000)
    assert (body(chunk), chunk.stop, chunk.ends) == (b"1;3;", 3, True)
    assert chunk.message == {"type": "http.response.body", "body": b"1;3;", "more_body": False}
    other = frames.chunk(0, "b", 1_000)
    assert (body(other), other.stop, other.last_seq, other.ends) == (b"2;4;", 5, 5, False)


def test_chunk_without_events_of_the_wanted_generation_still_moves_on() -> None:
    chunk = Frames(tail_of(("a", "delta"), ("a", "delta")), Plain(), AT).chunk(0, "b", 1_000)
    assert (chunk.count, chunk.message, chunk.stop, chunk.last_seq) == (0, None, 2, 2)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=120), st.integers(10, 200), st.data())
def test_frames_follow_an_evicting_tail_and_are_encoded_at_most_once(
    sizes: list[int], max_bytes: int, data: st.DataObject
) -> None:
    tail, format_ = Tail(0, max_bytes), Plain()
    frames = Frames(tail, format_, AT)
    for seq, size in enumerate(sizes, 1):
        tail.append(Entry(seq, "g", "delta", b"x" * size))
        if data.draw(st.booleans()):
            start = data.draw(st.integers(tail.base, tail.end))
            expected = b"".join(b"%d;" % entry.seq for entry in tail.slice(start, tail.end))
            assert body(frames.chunk(start, None, 1_000_000)) == expected
    assert len(format_.made) == len(set(format_.made))


def test_a_gap_is_framed_before_its_event_and_is_not_counted_as_one() -> None:
    tail = Tail(0, 10_000)
    tail.append(Entry(3, "a", "delta", b"x"))
    tail.append(Entry(7, "b", "delta", b"y", gap="events_expired"))
    frames = Frames(tail, Plain(), AT)
    one = frames.chunk(1, None, 10_000, max_events=1)
    assert body(one) == b'event: gap\ndata: {"reason":"events_expired","generation":"b"}\n\n7;'
    assert (one.count, one.size, one.stop, one.last_seq, one.offset) == (1, 2, 3, 7, 0)
    assert body(frames.chunk(0, "a", 10_000)) == b"3;"


def test_a_reader_that_was_sent_only_a_gap_resumes_before_it() -> None:
    tail = Tail(0, 10_000)
    tail.append(gap_before(Entry(7, "b", "delta", b"y", gap="events_expired")))
    alone = Frames(tail, Plain(), AT).chunk(0, None, 10_000)
    assert (alone.count, alone.last_seq, alone.offset) == (0, 6, 0)
    assert tail.after(alone.last_seq, alone.offset) == 0
