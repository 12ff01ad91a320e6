"""The decoder of server-sent events."""

import httpx_sse
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.producer.core.sse import COMMENT, STRAY, OversizedEvent, SseDecoder


def decoded(*chunks: bytes) -> list[tuple[bytes, bytes]]:
    decoder = SseDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


@pytest.mark.parametrize(
    ("wire", "events"),
    [
        (b"data: a\n\n", [(b"", b"a")]),
        (b"data:a\n\n", [(b"", b"a")]),
        (b"data:  a\n\n", [(b"", b" a")]),
        (b"data: a\ndata: b\n\n", [(b"", b"a\nb")]),
        (b"event: x\ndata: a\n\n", [(b"x", b"a")]),
        (b"data: a\nevent: x\n\n", [(b"x", b"a")]),
        (b"event: x\n\ndata: a\n\n", [(STRAY, b"event: x"), (b"", b"a")]),
        (b"event: :\ndata: a\n\n", [(b":", b"a")]),
        (b"data\n\n", [(b"", b"")]),
        (b": hi\n\n", [(COMMENT, b"hi")]),
        (b":\n\n", [(COMMENT, b"")]),
        (b": hi\ndata: a\n\n", [(COMMENT, b"hi"), (b"", b"a")]),
        (b"id: 7\nretry: 10\nother: x\ndata: a\n\n", [(STRAY, b"other: x"), (b"", b"a")]),
        (b"error: {}\n\n", [(STRAY, b"error: {}")]),
        (b"{\n}\n\ndata: a\n\n", [(STRAY, b"{\n}"), (b"", b"a")]),
        (b"\n\n\n\ndata: a\n\n\n\n\ndata: b\n\n", [(b"", b"a"), (b"", b"b")]),
        (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [(b"", b"a"), (b"", b"b"), (b"", b"c")]),
        (b"\xef\xbb\xbfdata: a\n\n", [(b"", b"a")]),
        (b"data: a", []),
        (b"data: a\n", []),
        (b"", []),
    ],
)
def test_events_are_decoded_under_every_chunking(wire: bytes, events: list[tuple[bytes, bytes]]) -> None:
    assert decoded(wire) == events
    assert decoded(*(wire[i : i + 1] for i in range(len(wire)))) == events
    for at in range(len(wire)):
        assert decoded(wire[:at], b"", wire[at:]) == events


@pytest.mark.parametrize(
    ("wire", "events"),
    [
        (b"data: a\n", [(b"", b"a")]),
        (b"data: a\r\n", [(b"", b"a")]),
        (b"event: x\ndata: a\ndata: b", [(b"x", b"a\nb")]),
        (b"Bad Gateway", [(STRAY, b"Bad Gateway")]),
        (b"data: a\n\n", []),
        (b"\xef\xbb", [(STRAY, b"\xef\xbb")]),
        (b"", []),
    ],
)
def test_an_unterminated_event_at_the_end_of_the_body_is_returned(
    wire: bytes, events: list[tuple[bytes, bytes]]
) -> None:
    for size in (1, 3, 100):
        decoder = SseDecoder()
        for at in range(0, len(wire), size):
            decoder.feed(wire[at : at + size])
        assert decoder.finish() == events
        assert decoder.finish() == []


def test_a_carriage_return_ends_the_event_without_waiting_for_a_line_feed() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b"data: a\r\n\r") == [(b"", b"a")]
    assert decoder.feed(b"\ndata: b\n\n") == [(b"", b"b")]


LINES = st.lists(
    st.sampled_from(["data: a", "data:é🌊", "data:", "event: x", ": c", "", "", "id: 1", "data", "junk", " data: x"]),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(lines=LINES, line_end=st.sampled_from(["\n", "\r\n", "\r"]), data=st.data())
def test_agrees_with_another_decoder_under_every_chunking(lines: list[str], line_end: str, data: st.DataObject) -> None:
    wire = "".join(line + line_end for line in lines).encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(wire)), max_size=10)))
    ours = decoded(*(wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)))
    peer = httpx_sse._decoders.SSEDecoder()
    theirs = [event for line in lines if (event := peer.decode(line)) is not None]
    # the peer also gives events without data, for their id
    assert [(n.decode() or "message", d.decode()) for n, d in ours if n not in (COMMENT, STRAY) and d] == [
        (e.event, e.data) for e in theirs if e.data
    ]


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_an_event_longer_than_the_limit_is_refused(size: int) -> None:
    wire = b"data: a\n\ndata: " + b"x" * 200 + b"\n\n"
    decoder = SseDecoder(limit=100)
    chunks = (wire[at : at + size] for at in range(0, len(wire), size))
    with pytest.raises(OversizedEvent, match="longer than 100 bytes"):
        list(map(decoder.feed, chunks))


def test_many_small_events_in_one_read_are_not_oversized() -> None:
    assert len(SseDecoder(limit=100).feed(b"data: a\n\n" * 1000)) == 1000


def test_a_large_event_in_many_small_reads_is_joined_once() -> None:
    wire = b"data: " + b"x" * 1_000_000 + b"\n\n"
    [(_, data)] = decoded(*(wire[i : i + 1000] for i in range(0, len(wire), 1000)))
    assert len(data) == 1_000_000
