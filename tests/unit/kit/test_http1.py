"""HTTP/1.1 as bytes on a connection: heads, pipelines, old clients, garbage, and clients that stop reading."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bench.processes import free_port
from services.kit import http1, http1_sender
from services.kit.http import HEAD_BYTES, serving
from services.kit.problem import Problem, send_problem
from tests.conftest import eventually

GET = b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n"


class Echo:
    """Responds with the path; below ``/stream`` with the pieces of `pieces`, below ``/wait`` after `go_on`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.disconnected: list[str] = []
        self.go_on = asyncio.Event()
        self.pieces: list[dict[str, Any]] = []
        self.sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.asked.append(path)
        if path.startswith("/fail"):
            raise RuntimeError("a fault of the application")
        if path.startswith("/length"):
            headers = [(b"content-length", b"4")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"four"})
            return
        watch = asyncio.create_task(self._watch(path, receive))
        try:
            if path.startswith("/wait"):
                await self.go_on.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            if path.startswith("/cut"):
                await send({"type": "http.response.body", "body": b"some", "more_body": True})
                return
            for piece in self.pieces:
                await send(piece)
                self.sent += 1
            await send({"type": "http.response.body", "body": path.encode(), "more_body": False})
        finally:
            watch.cancel()

    async def _watch(self, path: str, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.disconnected.append(path)


class Refusing:
    """Answers 413 without reading a body."""

    def __init__(self, *, closes: bool) -> None:
        self._headers = [(b"content-length", b"7"), *([(b"connection", b"close")] if closes else [])]

    async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": self._headers})
        await send({"type": "http.response.body", "body": b"refused", "more_body": False})


class Wire:
    """One connection as bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    async def flood(self, data: bytes, times: int = 1_000, pause: float = 0.01) -> None:
        for _ in range(times):
            self.writer.write(data)
            await self.writer.drain()
            await asyncio.sleep(pause)

    async def until(self, end: bytes) -> bytes:
        async with asyncio.timeout(20):
            return await self.reader.readuntil(end)

    async def rest(self) -> bytes:
        async with asyncio.timeout(20):
            return await self.reader.read()


Dial = Callable[[], Awaitable[Wire]]


@asynccontextmanager
async def echoing(app: Any, **options: Any) -> AsyncIterator[Dial]:
    port = free_port()
    wires: list[Wire] = []

    async def dial() -> Wire:
        wires.append(Wire(*await asyncio.open_connection("127.0.0.1", port)))
        return wires[-1]

    async with serving(app, "127.0.0.1", port, grace=lambda: 2, **options):
        try:
            yield dial
        finally:
            for wire in wires:
                wire.writer.close()


def pieces(*bodies: bytes) -> list[dict[str, Any]]:
    return [{"type": "http.response.body", "body": body, "more_body": True} for body in bodies]


async def test_pipelined_requests_are_answered_in_their_order() -> None:
    async with echoing(echo := Echo()) as dial:
        wire = await dial()
        wire.say(GET % b"wait" + GET % b"b" + GET % b"c")
        await eventually(lambda: echo.asked == ["/wait"])
        echo.go_on.set()
        for path in (b"/wait", b"/b", b"/c"):
            assert (await wire.until(b"0\r\n\r\n")).endswith(b"\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(path), path))


async def test_a_disconnect_with_pipelined_requests_is_noticed_by_the_running_request() -> None:
    async with echoing(echo := Echo()) as dial:
        wire = await dial()
        wire.say(GET % b"wait" + GET % b"b")
        await eventually(lambda: echo.asked == ["/wait"])
        wire.writer.close()
        await eventually(lambda: echo.disconnected == ["/wait"])
        echo.go_on.set()
    assert echo.asked == ["/wait"]


async def test_more_requests_than_may_wait_for_their_answers_end_the_connection() -> None:
    async with echoing(echo := Echo()) as dial:
        wire = await dial()
        wire.say(GET % b"wait" * (http1.PIPELINED + 2))
        assert await wire.rest() == b""
        await eventually(lambda: echo.disconnected == ["/wait"])


@pytest.mark.parametrize(("path", "head", "body"), [(b"x", b"", b"/x"), (b"length", b"content-length: 4", b"four")])
async def test_a_client_of_http_1_0_gets_no_chunks(path: bytes, head: bytes, body: bytes) -> None:
    echo = Echo()
    echo.pieces = [] if head else pieces(b"one ", b"two ")
    async with echoing(echo) as dial:
        wire = await dial()
        wire.say(b"GET /%b HTTP/1.0\r\n\r\n" % path)
        answer_head, _, answer = (await wire.rest()).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in answer_head.lower()
    assert head in answer_head
    assert answer == (b"" if head else b"one two ") + body


async def test_each_piece_of_a_stream_is_one_chunk() -> None:
    echo = Echo()
    shared = pieces(b"data: 1\n\n" * 3)[0]
    echo.pieces = [shared, shared, *pieces(b"", b"x" * 20)]
    async with echoing(echo) as dial:
        wire = await dial()
        wire.say(GET % b"s")
        _, _, answer = (await wire.until(b"\r\n0\r\n\r\n")).partition(b"\r\n\r\n")
    chunk = b"1b\r\n" + b"data: 1\n\n" * 3 + b"\r\n"
    assert answer == chunk * 2 + b"14\r\n" + b"x" * 20 + b"\r\n2\r\n/s\r\n0\r\n\r\n"


async def test_a_failed_response_has_no_final_chunk() -> None:
    async with echoing(Echo()) as dial:
        wire = await dial()
        wire.say(GET % b"cut")
        assert (await wire.rest()).endswith(b"4\r\nsome\r\n")


async def test_a_fault_of_the_application_is_answered_with_problem_details() -> None:
    async with echoing(Echo()) as dial:
        wire = await dial()
        wire.say(GET % b"fail")
        head, _, body = (await wire.rest()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 500 ")
    assert json.loads(body)["type"] == "urn:tailrace:problem:internal"
    assert b"fault of the application" not in body


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"this is no request at all\r\n\r\n", 400),
        (b"PRI * HTTP/3.0\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /" + b"x" * HEAD_BYTES + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * HEAD_BYTES, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * HEAD_BYTES, 431),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 400),
        (POST % b"Content-Length: 3\r\nContent-Length: 4", 400),
        (POST % b"Content-Length: 3, 4", 400),
        (POST % b"Content-Length: +3", 400),
        (POST % b"Content-Length: -1", 400),
        (POST % b"Content-Length: 0x3", 400),
        (POST % b"Content-Length: ", 400),
        (POST % b"Content-Length: 3\r\nTransfer-Encoding: chunked", 400),
        (POST % b"Transfer-Encoding: chunked, identity", 400),
        (POST % b"Transfer-Encoding: identity", 501),
        (POST % b"Transfer-Encoding: gzip, chunked", 501),
        (POST % b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 400),
        (POST % b"Transfer-Encoding : chunked", 400),
        (POST % b"X: a\r\n b", 400),
        (POST % b"X\x00: a", 400),
        (POST % b"X: a\x00b", 400),
        (POST % b" X: a", 400),
        (POST % b"no colon", 400),
        (b"POST / HTTP/1.1\nHost: x\n\n", 400),
        (b"GET / HTTP/1.2\r\nHost: x\r\n\r\n", 400),
    ],
    ids=repr,
)
async def test_an_invalid_request_is_refused_with_problem_details(said: bytes, status: int) -> None:
    async with echoing(echo := Echo()) as dial:
        wire = await dial()
        wire.say(said)
        head, _, body = (await wire.until(b"}")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"content-type: application/problem+json" in head
    assert json.loads(body)["status"] == status
    assert echo.asked == []


@pytest.mark.parametrize("closes", [False, True])
async def test_an_answer_arrives_although_its_request_was_not_read(closes: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(http1, "DRAIN_BYTES", 4 * 1024 * 1024)
    size = 3 * 1024 * 1024
    async with echoing(Refusing(closes=closes)) as dial:
        wire = await dial()
        wire.say(POST % b"Content-Length: %d" % size)
        head = await wire.until(b"refused")  # before anything of the body
        await wire.flood(b"x" * (size // 100), times=100)
        if closes:
            assert b"connection: close" in head
            assert await wire.rest() == b""
        else:
            wire.say(b"x" * (size % 100) + POST % b"Content-Length: 0")
            assert (await wire.until(b"refused")).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("closes", [False, True])
async def test_an_unread_body_is_disconnected_beyond_its_size_bound(closes: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(http1, "DRAIN_BYTES", 1024 * 1024)
    async with echoing(Refusing(closes=closes)) as dial:
        wire = await dial()
        wire.say(POST % b"Content-Length: 1000000000")
        await wire.until(b"refused")
        with pytest.raises(ConnectionError):
            await wire.flood(b"x" * 100_000)


@pytest.mark.parametrize("closes", [False, True])
async def test_an_unread_body_is_disconnected_beyond_its_time_bound(closes: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(http1, "DRAIN_SECONDS", 0.2)
    async with echoing(Refusing(closes=closes)) as dial:
        wire = await dial()
        wire.say(POST % b"Content-Length: 1000000")
        await wire.until(b"refused")
        with pytest.raises(ConnectionError):
            await wire.flood(b"x", pause=0.05)


async def test_a_client_with_endless_trailers_is_disconnected() -> None:
    async with echoing(echo := Echo()) as dial:
        wire = await dial()
        wire.say(b"POST /wait HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ")
        await eventually(lambda: echo.asked == ["/wait"])
        with pytest.raises(ConnectionError):
            await wire.flood(b"x" * HEAD_BYTES)
        await eventually(lambda: echo.disconnected == ["/wait"])


async def test_garbage_behind_a_request_is_never_mixed_into_its_answer() -> None:
    async with echoing(echo := Echo()) as dial:
        wire = await dial()
        wire.say(GET % b"wait")
        await eventually(lambda: echo.asked == ["/wait"])
        wire.say(b"!!!\r\n\r\n")
        assert await wire.rest() == b""
        await eventually(lambda: echo.disconnected == ["/wait"])


async def test_a_connection_beyond_the_bound_gets_503_with_retry_after() -> None:
    async with echoing(echo := Echo(), connections=1) as dial:
        first, second = await dial(), await dial()
        first.say(GET % b"wait")
        await eventually(lambda: echo.asked == ["/wait"])
        second.say(GET % b"x")
        head, _, body = (await second.rest()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in head
        assert json.loads(body)["detail"] == "too many requests are under way"
        echo.go_on.set()
        await first.until(b"0\r\n\r\n")
        third = await dial()
        third.say(GET % b"x")
        assert b"200 OK" in await third.until(b"0\r\n\r\n")


@pytest.mark.parametrize("said", [b"", b"P", b"PRI * HT", b"GET / HTTP/1.1\r\nX-Slow: ", b"\r\n"])
async def test_a_client_with_an_incomplete_head_is_disconnected(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "HEAD_SECONDS", 0.3)
    async with echoing(Echo()) as dial:
        wire = await dial()
        wire.say(said)
        assert await wire.rest() == b""


async def test_a_reused_connection_is_not_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "HEAD_SECONDS", 0.3)
    async with echoing(Echo()) as dial:
        wire = await dial()
        for _ in range(3):
            wire.say(GET % b"x")
            await wire.until(b"0\r\n\r\n")
            await asyncio.sleep(0.4)


async def test_a_client_that_does_not_read_blocks_the_stream() -> None:
    echo = Echo()
    echo.pieces = pieces(*[b"x" * 100_000] * 200)
    async with echoing(echo) as dial:
        wire = await dial()
        wire.say(GET % b"s")
        stood = -1

        async def stands() -> bool:
            nonlocal stood
            stood, before = echo.sent, stood
            return 0 < echo.sent == before

        await eventually(stands, interval=0.3)
        assert echo.sent < 150
        async with asyncio.timeout(20):
            received = 0
            while echo.sent < 200:
                received += len(await wire.reader.read(1_000_000))
        assert received > 10_000_000


async def test_offered_chunks_are_sent_in_order_and_do_not_end_the_response() -> None:
    shared, empty = pieces(b"two", b"")
    last = {"type": "http.response.body", "body": b"last", "more_body": False}
    taken = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send(pieces(b"one")[0])
        taken.extend([send.offer(shared), send.offer(empty), send.offer(shared), send.offer(last)])
        await send(last)

    async with echoing(app) as dial:
        wire = await dial()
        wire.say(GET % b"s")
        _, _, answer = (await wire.until(b"\r\n0\r\n\r\n")).partition(b"\r\n\r\n")
    assert taken == [True, True, True, False]
    assert answer == b"3\r\none\r\n3\r\ntwo\r\n3\r\ntwo\r\n4\r\nlast\r\n0\r\n\r\n"


async def test_an_offer_is_accepted_only_while_the_client_reads() -> None:
    taken: list[bool] = []
    go_on, done = asyncio.Event(), asyncio.Event()
    piece = pieces(b"x" * 100_000)[0]

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        taken.append(send.offer(piece))  # before the answer has begun
        await send({"type": "http.response.start", "status": 200, "headers": []})
        taken.append(send.offer(piece))
        await send(piece)
        while send.offer(piece):
            if len(taken) > 1_000:
                break
            taken.append(True)
            await asyncio.sleep(0)
        taken.append(send.offer(piece))
        await go_on.wait()
        await send(piece)
        taken.append(send.offer(piece))
        await send({"type": "http.response.body", "body": b"end", "more_body": False})
        taken.append(send.offer(piece))
        done.set()

    async with echoing(app) as dial:
        wire = await dial()
        wire.say(GET % b"s")
        await eventually(lambda: taken[-1:] == [False] and len(taken) > 3)
        before = len(taken)
        assert taken[:2] == [False, False]
        assert all(taken[2:-1])
        go_on.set()
        received = 0
        async with asyncio.timeout(20):
            while not done.is_set():
                received += len(await wire.reader.read(1_000_000))
    assert taken[before:] == [True, False]


async def test_the_application_answers_a_pending_websocket_handshake_while_the_server_stops() -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "websocket.connect"
        asked.set()
        await go_on.wait()
        await send_problem(send, Problem(503, "this replica is going away"), "websocket.http")

    port = free_port()
    async with serving(app, "127.0.0.1", port, grace=lambda: 5):
        wire = Wire(*await asyncio.open_connection("127.0.0.1", port))
        wire.say(
            b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await asked.wait()
        asyncio.get_running_loop().call_later(0.2, go_on.set)
    head, _, body = (await wire.rest()).partition(b"\r\n\r\n")
    wire.writer.close()
    assert head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(body)["detail"] == "this replica is going away"


@pytest.mark.parametrize("size", [0, 5, 125, 126, 65_535, 65_536])
def test_a_frame_is_encoded_as_in_rfc_6455(size: int) -> None:
    text = http1_sender._frame({"text": "x" * size})
    assert text == b"\x81" + _length(size) + b"x" * size
    assert http1_sender._frame({"bytes": b"x" * size}) == b"\x82" + text[1:]


def _length(size: int) -> bytes:
    if size < 126:
        return bytes([size])
    return b"\x7e" + size.to_bytes(2, "big") if size < 65_536 else b"\x7f" + size.to_bytes(8, "big")
