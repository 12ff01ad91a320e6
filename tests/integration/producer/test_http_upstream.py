"""The HTTP upstream against a real server."""

import asyncio
import gzip
import json
import socket
import zlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from schemas.requests import Message
from services.kit.clock import SystemClock
from services.producer.adapters.http_upstream import HttpStream, upstream_session
from services.producer.adapters.upstreams import build_upstream
from services.producer.core.parts import End, NoticePart, Part, Text, UpstreamFailure, UsagePart
from services.producer.core.registry import Provider, Secret
from services.producer.ports import Upstream, UpstreamRefused, UpstreamRequest
from tests.conftest import eventually
from tests.support.provider_server import Replay, providing, unlistening_port
from tests.support.provider_transcripts import TRANSCRIPTS, Transcript, described

KEY = "sk-test-0123456789abcdef"
SECRET = "o-secret-header-0123456789"
TEXT = Transcript("openai", "text")


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with upstream_session() as opened:
        yield opened


def upstream(session: aiohttp.ClientSession, url: str, dialect: str = "openai", **settings: Any) -> Upstream:
    provider = Provider(name="p", dialect=dialect, base_url=url, key=Secret(KEY), **settings)
    return build_upstream(provider, session, SystemClock())


def call(**settings: Any) -> UpstreamRequest:
    return UpstreamRequest(model="m", messages=[Message("user", "hi")], **settings)


async def all_parts(opened: Upstream, asked: UpstreamRequest | None = None) -> list[Part]:
    parts: list[Part] = []
    async with asyncio.timeout(20), opened.open(asked or call()) as stream:
        while (read := await stream.read()) is not None:
            parts += read
    return parts


async def refused(opened: Upstream, asked: UpstreamRequest | None = None) -> UpstreamRefused:
    with pytest.raises(UpstreamRefused) as caught:
        await all_parts(opened, asked)
    return caught.value


@pytest.mark.parametrize("size", [17, 100_000])
@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=str)
async def test_every_transcript_reads_the_same_over_http(
    session: aiohttp.ClientSession, transcript: Transcript, size: int
) -> None:
    async with providing(Replay.of(transcript.wire, size, headers=transcript.headers)) as provider:
        parts = await all_parts(upstream(session, provider.url, transcript.dialect))
    assert described(parts) == transcript.expected


async def test_a_read_returns_received_parts_without_waiting_for_more(session: aiohttp.ClientSession) -> None:
    go_on = asyncio.Event()
    events = TEXT.wire.split(b"\n\n")
    replay = Replay([b"\n\n".join(events[:3]) + b"\n\n", b"\n\n".join(events[3:])], gate=go_on.wait)
    async with providing(replay) as provider, upstream(session, provider.url).open(call()) as stream:
        async with asyncio.timeout(5):
            first = await stream.read()
        assert first is not None
        assert [p.text for p in first if isinstance(p, Text)] == ["A tail"]
        go_on.set()


async def test_the_text_of_one_read_is_one_part(session: aiohttp.ClientSession) -> None:
    async with providing(Replay.of(TEXT.wire, 100_000)) as provider:
        parts = await all_parts(upstream(session, provider.url))
    assert len([p for p in parts if isinstance(p, Text)]) == 1


async def test_the_upstream_id_is_read_from_the_header(session: aiohttp.ClientSession) -> None:
    headers = {"content-type": "text/event-stream; charset=utf-8", "X-Generation-Id": "gen-other"}
    async with providing(Replay.of(Transcript("openrouter", "text").wire, headers=headers)) as provider:
        parts = await all_parts(upstream(session, provider.url, "openrouter"))
    assert described(parts)[0]["upstream_id"] == "gen-other"


@pytest.mark.parametrize(
    ("status", "code", "recoverable"),
    [
        (401, "upstream_unauthorized", False),
        (404, "upstream_not_found", False),
        (429, "upstream_rate_limited", True),
        (500, "upstream_error", True),
        (529, "upstream_overloaded", True),
    ],
)
async def test_a_refusal_is_typed_and_never_shows_the_key(
    session: aiohttp.ClientSession, status: int, code: str, recoverable: bool
) -> None:
    body = b'{"error": {"message": "no: Bearer %s, x-other o-secret-header"}}' % KEY.encode()
    headers = {"content-type": "application/json", "retry-after": "3"}
    async with providing(Replay([body], status=status, headers=headers)) as provider:
        error = await refused(upstream(session, provider.url, headers={"X-Other": "o-secret-header"}))
    assert (error.failure.code, error.failure.recoverable) == (code, recoverable)
    assert error.failure.upstream_status == status
    assert error.failure.retry_after == 3.0
    assert KEY not in str(error)
    assert "o-secret-header" not in str(error)
    assert "no:" in str(error)


async def test_a_failure_inside_the_stream_never_shows_the_key(session: aiohttp.ClientSession) -> None:
    wire = b'data: {"error": {"message": "bad key %s"}}\n\n' % KEY.encode()
    async with providing(Replay([wire])) as provider:
        [failure] = await all_parts(upstream(session, provider.url))
    assert isinstance(failure, UpstreamFailure)
    assert failure.message == "bad key ***"


async def test_an_error_body_is_read_up_to_a_bound(session: aiohttp.ClientSession) -> None:
    body = b"x" * 10_000_000
    async with providing(Replay.of(body, 100_000, status=500, headers={"content-type": "text/plain"})) as provider:
        error = await refused(upstream(session, provider.url))
    assert len(error.failure.message) <= 500


@pytest.mark.parametrize(
    ("content_type", "body", "code"),
    [
        ("application/json", b'{"error": {"message": "slow down", "code": 429}}', "upstream_rate_limited"),
        ("text/event-stream", b'{"error": {"message": "slow down", "code": 429}}', "upstream_rate_limited"),
        ("application/json", b'{"choices": []}', "upstream_malformed"),
        ("text/plain", b"Too many requests", "upstream_rate_limited"),
        ("text/plain", b"hello", "upstream_malformed"),
        ("text/html", b'{"error": {"message": "slow down", "code": 429}}', "upstream_rate_limited"),
    ],
)
async def test_a_response_that_is_no_stream_is_a_failure(
    session: aiohttp.ClientSession, content_type: str, body: bytes, code: str
) -> None:
    headers = {"content-type": content_type, "retry-after": "3"}
    async with providing(Replay([body], headers=headers)) as provider:
        [*_, failure] = await all_parts(upstream(session, provider.url))
    assert isinstance(failure, UpstreamFailure)
    assert (failure.code, failure.retry_after) == (code, 3.0)


@pytest.mark.parametrize("body", [b"<html>please log in</html>", b"<", b" \n", b""])
async def test_an_html_page_is_a_refusal(session: aiohttp.ClientSession, body: bytes) -> None:
    async with providing(Replay([body], headers={"content-type": "text/html"})) as provider:
        error = await refused(upstream(session, provider.url))
    assert error.failure.code == "upstream_malformed"
    assert "text/html" in error.failure.message


@pytest.mark.parametrize("label", ["application/json", "text/html; charset=utf-8", "application/x-ndjson", "video/mp4"])
@pytest.mark.parametrize("size", [1, 100_000])
async def test_an_event_stream_under_another_label_is_an_answer(
    session: aiohttp.ClientSession, label: str, size: int
) -> None:
    wire = b"\n" + TEXT.wire
    async with providing(Replay.of(wire, size, headers={"content-type": label})) as provider:
        parts = await all_parts(upstream(session, provider.url))
    assert described(parts) == TEXT.expected


@pytest.mark.parametrize("label", ["application/json", "application/json; charset=utf-8", "text/event-stream", ""])
@pytest.mark.parametrize("status", [200, 201])
async def test_a_whole_answer_is_an_answer(session: aiohttp.ClientSession, label: str, status: int) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
    body = json.dumps({"id": "c", "object": "chat.completion", "choices": [choice]}).encode()
    async with providing(Replay.of(body, 7, status=status, headers={"content-type": label})) as provider:
        parts = await all_parts(upstream(session, provider.url))
    assert [part.text for part in parts if isinstance(part, Text)] == ["Hello"]
    assert isinstance(parts[-1], End)


@pytest.mark.parametrize("wire", [TEXT.wire, TEXT.wire.removesuffix(b"data: [DONE]\n\n")])
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_body_is_read_though_it_was_not_asked_for(
    session: aiohttp.ClientSession, encoding: str, wire: bytes
) -> None:
    packed = gzip.compress(wire) if encoding == "gzip" else zlib.compress(wire)
    headers = {"content-type": "text/event-stream", "content-encoding": encoding}
    async with providing(Replay.of(packed, 50, headers=headers)) as provider:
        parts = await all_parts(upstream(session, provider.url))
    assert described(parts) == TEXT.expected


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd"])
async def test_a_body_that_cannot_be_decompressed_is_cut_off_or_refused(
    session: aiohttp.ClientSession, encoding: str
) -> None:
    headers = {"content-type": "text/event-stream", "content-encoding": encoding}
    async with providing(Replay.of(TEXT.wire, headers=headers)) as provider:
        try:
            [*_, failure] = await all_parts(upstream(session, provider.url))
        except UpstreamRefused as error:
            failure = error.failure
    assert isinstance(failure, UpstreamFailure)
    assert failure.code in ("upstream_cut_off", "upstream_unreachable", "upstream_malformed")


async def test_a_notice_never_shows_the_key(session: aiohttp.ClientSession) -> None:
    wire = b'data: {"debug": "key %s"}\n\n' % KEY.encode() + TEXT.wire
    async with providing(Replay([wire])) as provider:
        parts = await all_parts(upstream(session, provider.url))
    [notice] = [part for part in parts if isinstance(part, NoticePart)]
    assert KEY not in notice.message
    assert "key ***" in notice.message
    assert isinstance(parts[-1], End)


async def test_text_behind_the_last_event_never_shows_the_key(session: aiohttp.ClientSession) -> None:
    answer = Transcript("openai", "cut-off").wire.rpartition(b"\n\n")[0]
    for room in (0, 270):  # the second one is cut within the key
        wire = answer + b"\n\nworker died:%s key %s" % (b" x" * (room // 2), SECRET.encode())
        async with providing(Replay([wire])) as provider:
            [*_, failure] = await all_parts(upstream(session, provider.url, headers={"x-other": SECRET}))
        assert isinstance(failure, UpstreamFailure)
        assert "worker died" in failure.message
        assert SECRET[:8] not in failure.message


async def test_redirects_are_not_followed(session: aiohttp.ClientSession) -> None:
    async with providing(Replay(status=307, headers={"location": "/elsewhere"})) as provider:
        error = await refused(upstream(session, provider.url))
        assert len(provider.asked) == 1
    assert error.failure.upstream_status == 307


@pytest.mark.parametrize("dialect", ["openai", "openrouter", "anthropic", "cohere"])
async def test_a_connection_reset_mid_stream_is_cut_off(session: aiohttp.ClientSession, dialect: str) -> None:
    wire = Transcript(dialect, "text").wire
    released = asyncio.Event()
    replay = Replay([wire[: len(wire) // 2]], end="reset", gate=released.wait)
    async with providing(replay) as provider, upstream(session, provider.url, dialect).open(call()) as stream:
        parts: list[Part] = []
        while not any(isinstance(p, Text) for p in parts):
            parts += await stream.read() or []
        released.set()
        while (read := await stream.read()) is not None:
            parts += read
        assert await stream.read() is None
    assert isinstance(parts[-1], UpstreamFailure)
    assert (parts[-1].code, parts[-1].recoverable) == ("upstream_cut_off", True)


async def test_a_stream_that_closes_without_end_marker_is_cut_off(session: aiohttp.ClientSession) -> None:
    async with providing(Replay.of(Transcript("openai", "cut-off").wire)) as provider:
        [*_, failure] = await all_parts(upstream(session, provider.url))
    assert isinstance(failure, UpstreamFailure)
    assert (failure.code, failure.recoverable) == ("upstream_cut_off", True)


@pytest.mark.parametrize("dialect", ["openai", "openrouter", "anthropic"])
@pytest.mark.parametrize("end", ["close", "reset"])
async def test_an_answer_without_its_end_marker_is_complete_only_at_a_clean_end(
    session: aiohttp.ClientSession, dialect: str, end: Any
) -> None:
    """A chunked body without its last chunk is not clean: the missing part is unknown."""
    transcript = Transcript(dialect, "text")
    marker = transcript.wire.rfind(b"event: message_stop" if dialect == "anthropic" else b"data: [DONE]")
    read = asyncio.Event()
    replay = Replay([transcript.wire[:marker]], headers=transcript.headers, end=end, gate=read.wait)
    async with providing(replay) as provider, upstream(session, provider.url, dialect).open(call()) as stream:
        parts: list[Part] = []
        async with asyncio.timeout(20):
            while not any(isinstance(part, UsagePart) for part in parts):
                parts += await stream.read() or []
            read.set()
            while (more := await stream.read()) is not None:
                parts += more
    if end == "close":
        assert described(parts) == transcript.expected
    else:
        assert isinstance(parts[-1], UpstreamFailure)
        assert parts[-1].code == "upstream_cut_off"


async def test_a_refused_connection_is_unreachable_with_its_cause(session: aiohttp.ClientSession) -> None:
    async with unlistening_port() as port:
        error = await refused(upstream(session, f"http://127.0.0.1:{port}"))
    assert (error.failure.code, error.failure.recoverable) == ("upstream_unreachable", True)
    assert isinstance(error.__cause__, aiohttp.ClientConnectorError)


async def test_a_server_that_does_not_accept_is_unreachable_after_the_connect_timeout(
    session: aiohttp.ClientSession,
) -> None:
    waiting: list[socket.socket] = []
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):  # fill the queue that nobody accepts from
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(deaf.getsockname())
        error = await refused(upstream(session, f"http://127.0.0.1:{deaf.getsockname()[1]}"), call(connect_timeout=0.3))
        for each in waiting:
            each.close()
    assert error.failure.code == "upstream_unreachable"
    assert "within 0.3 s" in error.failure.message


async def test_cancelling_the_wait_for_headers_closes_the_connection(session: aiohttp.ClientSession) -> None:
    async with providing(Replay.of(TEXT.wire, headers_after=asyncio.Event())) as provider:
        waiting = asyncio.create_task(all_parts(upstream(session, provider.url)))
        await eventually(lambda: provider.active == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await eventually(lambda: provider.active == 0)
        assert provider.abandoned == 1


async def test_leaving_the_stream_closes_the_connection_at_once(session: aiohttp.ClientSession) -> None:
    async with providing(Replay([TEXT.wire[:500]], end="hang")) as provider:
        async with upstream(session, provider.url).open(call()) as stream:
            await stream.read()
            assert provider.active == 1
        await eventually(lambda: provider.active == 0)
        assert provider.abandoned == 1


async def test_cancellation_while_reading_closes_the_connection(session: aiohttp.ClientSession) -> None:
    async with providing(Replay([TEXT.wire[:500]], end="hang")) as provider:
        reading = asyncio.create_task(all_parts(upstream(session, provider.url)))
        await eventually(lambda: provider.active == 1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await eventually(lambda: provider.active == 0)
        assert provider.abandoned == 1


async def test_an_answer_read_to_its_end_leaves_the_connection_for_the_next(session: aiohttp.ClientSession) -> None:
    async with providing(Replay.of(TEXT.wire)) as provider:
        for _ in range(3):
            await all_parts(upstream(session, provider.url))
        assert len(provider.asked) == 3
        assert session.connector is not None
        assert sum(len(c) for c in session.connector._conns.values()) == 1


async def test_the_request_has_path_headers_and_body_of_the_dialect(session: aiohttp.ClientSession) -> None:
    async with providing(Replay.of(TEXT.wire)) as provider:
        await all_parts(upstream(session, provider.url, headers={"X-Title": "t"}), call(params={"temperature": 0.5}))
        [asked] = provider.asked
    assert asked.path == "/chat/completions"
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.headers["x-title"] == "t"
    assert asked.headers["accept-encoding"] == "identity"
    assert asked.body == {
        "temperature": 0.5,
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_an_untranslatable_call_is_refused_without_a_request(session: aiohttp.ClientSession) -> None:
    async with providing() as provider:
        error = await refused(upstream(session, provider.url, "anthropic"), call(params={"n": 2}))
        assert provider.asked == []
    assert error.failure.code == "upstream_bad_request"
    assert not error.failure.recoverable


async def test_a_reader_that_is_behind_stops_the_connection_and_reading_starts_it_again_once(
    session: aiohttp.ClientSession,
) -> None:
    """Check what `StreamConnector` needs of aiohttp: each resume of reading is reported, with its state."""
    chunk = b'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % (b"x" * 1_000)
    replay = Replay([chunk] * 3_000 + [b"data: [DONE]\n\n"])
    async with providing(replay) as provider, upstream(session, provider.url).open(call()) as stream:
        assert isinstance(stream, HttpStream)
        assert stream._response.connection is not None
        protocol: Any = stream._response.connection.protocol
        resumed: list[bool] = []
        resume = protocol.transport.resume_reading

        class Watched:
            def __getattr__(self, name: str) -> Any:
                return getattr(transport, name)

            def resume_reading(self) -> None:
                resumed.append(transport.is_reading())
                resume()

        transport, protocol.transport = protocol.transport, Watched()
        await eventually(lambda: protocol._reading_paused)
        length = 0
        async with asyncio.timeout(20):
            while (parts := await stream.read()) is not None:
                length += sum(len(part.text) for part in parts if isinstance(part, Text))
                if any(isinstance(part, End) for part in parts):
                    break
    assert length == 3_000_000
    assert resumed
    assert not any(resumed), "a connection that reads is not told to read"
