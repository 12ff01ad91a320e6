"""Test that the clients of the benchmark detect every difference from the provider's text."""

import asyncio
import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.relay.readers import Expected, Harvest, Reader, native, openai
from bench.relay.scenarios import StreamOrder
from bench.stats import percentile
from bench.text import boundaries, tokens
from bench.wire import MalformedResponse, Response

ORDER = StreamOrder(stream=1, tokens=12, rate=None, phase=0.0, cell=12)
PIECES = tokens(ORDER.stream, ORDER.tokens)


def event(seq: int, **fields: object) -> bytes:
    body = msgspec.json.encode({"generation": "gen_a", "seq": seq, **fields})
    return f"id: c{seq}\ndata: ".encode() + body + b"\n\n"


def answer(payload: bytes, sizes: list[int]) -> bytes:
    """Return a chunked response whose chunk lengths repeat ``sizes``."""
    out, position, turn = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", 0, 0
    while position < len(payload):
        part = payload[position : position + sizes[turn % len(sizes)]]
        out += f"{len(part):x}\r\n".encode() + part + b"\r\n"
        position, turn = position + len(part), turn + 1
    return out + b"0\r\n\r\n"


class Transport:
    def write(self, _data: bytes) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


def read(pieces: list[str], end: str = "completed", cuts: tuple[int, ...] = ()) -> tuple[Harvest, Reader]:
    """Feed a native stream of these deltas, cut at these places, to a reader that expects ``PIECES``."""
    events = [event(0, type="started"), *(event(i, type="delta", text=p) for i, p in enumerate(pieces, 1))]
    data = answer(b"retry: 1000\n\n: hb\n\n" + b"".join(events) + event(99, type=end), [37])
    harvest = Harvest()
    stamps = memoryview(bytearray(8 * 64)).cast("q")
    reader = Reader(Expected(ORDER, stamps), harvest, native, b"GET / HTTP/1.1\r\n\r\n")
    reader.connection_made(Transport())  # type: ignore[arg-type]
    edges = [0, *sorted(cut % len(data) for cut in cuts), len(data)]
    for start, stop in itertools.pairwise(edges):
        if start < stop and not reader.closed.is_set():
            reader.data_received(data[start:stop])
    harvest.finish(ORDER, reader)
    return harvest, reader


@given(st.lists(st.integers(min_value=1, max_value=20), min_size=1, max_size=5), st.data())
def test_events_are_the_same_under_every_chunking(sizes: list[int], data: st.DataObject) -> None:
    payload = b"data: one\n\nid: 2\ndata: caf\xc3\xa9\n\n: hb\n\n"
    whole = answer(payload, sizes)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    response, blocks = Response(), []
    for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        blocks += response.feed(whole[start:stop])
    assert blocks == [b"data: one", b"id: 2\ndata: caf\xc3\xa9", b": hb"]
    assert response.ended
    assert response.status == 200


def test_a_counted_body_ends_with_its_last_byte() -> None:
    response = Response()
    ended = []
    for data in (b"HTTP/1.1 202 Accepted\r\ncontent-length: 2\r\n\r\n{", b"}"):
        response.feed(data)
        ended.append(response.ended)
    assert ended == [False, True]
    assert response.tail == b"{}"


def test_bytes_that_are_not_http_are_refused() -> None:
    with pytest.raises(MalformedResponse):
        Response().feed(b"SSH-2.0-OpenSSH\r\n\r\n")


@given(st.lists(st.integers(min_value=0, max_value=5_000), max_size=6))
async def test_identical_text_is_complete_and_every_token_has_its_latency(cuts: list[int]) -> None:
    harvest, reader = read(PIECES, cuts=tuple(cuts))
    assert (harvest.complete, harvest.mismatches, harvest.problems) == (1, 0, [])
    assert len(harvest.latencies) == ORDER.tokens
    assert reader.cursor == b"c99"


async def test_tokens_joined_into_one_event_still_count_one_by_one() -> None:
    harvest, _ = read(["".join(PIECES[:5]), "".join(PIECES[5:])])
    assert harvest.complete == 1
    assert harvest.events == 2
    assert len(harvest.latencies) == ORDER.tokens


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([*PIECES[:3], PIECES[2], *PIECES[3:]], id="doubled"),
        pytest.param([*PIECES[:3], *PIECES[4:]], id="lost"),
        pytest.param([*PIECES[:3], PIECES[4], PIECES[3], *PIECES[5:]], id="swapped"),
        pytest.param(tokens(2, ORDER.tokens), id="another stream's"),
        pytest.param([*PIECES, "more"], id="too long"),
    ],
)
async def test_a_text_that_differs_is_a_mismatch(pieces: list[str]) -> None:
    harvest, _ = read(pieces)
    assert (harvest.complete, harvest.mismatches) == (0, 1)
    assert "instead of" in harvest.problems[0]


async def test_a_text_that_stops_early_is_incomplete() -> None:
    harvest, _ = read(PIECES[:-1])
    assert harvest.complete == 0
    assert "characters" in harvest.problems[0]


async def test_another_terminal_than_completed_is_incomplete() -> None:
    harvest, _ = read(PIECES, end="failed")
    assert harvest.complete == 0
    assert "failed" in harvest.problems[0]


async def test_a_reconnecting_reader_resumes_after_its_last_event() -> None:
    _, reader = read(PIECES[:4])
    again = reader.again({})
    assert b"\r\nlast-event-id: c99\r\n" in again._call
    assert (again.position, again.token) == (reader.position, 4)


def test_control_events_comments_and_usage_carry_no_text() -> None:
    bye = b'event: bye\ndata: {"reason":"drain","cursor":"c"}'
    usage = b'id: c\ndata: {"type":"usage","generation":"g","seq":1}'
    assert [native(block) for block in (bye, b": hb", b"retry: 1000", usage)] == [(None, None)] * 4


def test_openai_chunks_give_text_and_end() -> None:
    assert openai(b'data: {"choices":[{"delta":{"content":" word"}}]}') == (" word", None)
    assert openai(b'data: {"choices":[],"usage":{}}') == (None, None)
    assert openai(b"data: [DONE]") == (None, "completed")
    assert openai(b'data: {"error":{"message":"no"}}')[1] is not None


def test_streams_have_texts_of_their_own() -> None:
    texts = {"".join(tokens(stream, 40)) for stream in range(900)}
    assert len(texts) == 900


def test_boundaries_are_the_ends_of_tokens() -> None:
    assert boundaries(["[0]", " a", "b"]) == [3, 5, 6]


@given(st.lists(st.integers(), min_size=1), st.sampled_from([1, 50, 95, 99, 100]))
def test_a_percentile_is_the_smallest_value_that_covers_its_share(values: list[int], percent: int) -> None:
    ordered = sorted(values)
    found = percentile(ordered, percent)
    assert sum(v <= found for v in ordered) * 100 >= percent * len(ordered)
    assert sum(v < found for v in ordered) * 100 < percent * len(ordered)


async def test_a_refused_request_is_incomplete() -> None:
    harvest = Harvest()
    reader = Reader(Expected(ORDER, memoryview(bytearray(8 * 64)).cast("q")), harvest, openai, b"")
    reader.connection_made(Transport())  # type: ignore[arg-type]
    reader.data_received(b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n")
    async with asyncio.timeout(1):
        await reader.closed.wait()
    harvest.finish(ORDER, reader)
    assert "status 503" in harvest.problems[0]
