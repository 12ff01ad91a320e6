"""The provider: an OpenAI-compatible server that stamps every token and holds its streams until a start command.

Run as ``python -m bench.provider --port N --stamps FILE``. It shares the machine with the system under test, so it must
use little processor time: each token is one prepared chunk and one write. ``GET /control`` returns the number of
waiting streams, ``POST /control`` starts them together.
"""

import argparse
import asyncio
import gc
import heapq
import time
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import uvloop

from bench.relay.scenarios import StreamOrder
from bench.stamps import Stamps
from bench.stats import percentile
from bench.text import token, word_index, words

__all__ = ["ControlState", "main"]

TICK: Final = 0.001
LEAD_NS: Final = 50_000_000
BURST: Final = 32
HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)


class ControlState(msgspec.Struct):
    """State of the streams. ``waiting``: held. ``finished``: sent to their end. ``late_ms``: the delay of the
    provider behind its schedule (it shares the processors; a late token is stamped when it is sent).
    """

    waiting: int
    finished: int
    late_p50_ms: float
    late_p99_ms: float


class _Message(msgspec.Struct):
    content: str | list[dict[str, Any]]


class _ChatRequest(msgspec.Struct):
    messages: list[_Message]
    stream_options: dict[str, Any] | None = None


def _chunk(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
    body = msgspec.json.encode(
        {
            "id": "chatcmpl-bench",
            "object": "chat.completion.chunk",
            "created": 1_700_000_000,
            "model": "bench",
            "system_fingerprint": "fp_bench",
            "choices": choices,
            "usage": usage,
        }
    )
    return _framed(body)


def _framed(body: bytes) -> bytes:
    event = b"data: " + body + b"\n\n"
    return f"{len(event):x}\r\n".encode() + event + b"\r\n"


def _content(text: str) -> bytes:
    return _chunk([{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}])


OPENING: Final = _chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
CLOSING: Final = _chunk([{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}])
DONE: Final = _framed(b"[DONE]")
WORDS: Final = tuple(_content(word) for word in words())


class Provider:
    """All streams: the held ones, and the schedule of the running ones."""

    def __init__(self, stamps: Stamps) -> None:
        self.cells = stamps.cells
        self.held: list[Stream] = []
        self.begun = False
        self.finished = 0
        self.lateness: list[int] = []
        self._due: list[tuple[int, int, Stream]] = []

    def add(self, stream: "Stream") -> None:
        """Hold a stream; once the others run, send its first token at once."""
        if not self.begun:
            self.held.append(stream)
        elif stream.order.rate is None:
            stream.pump()
        elif stream.send_one():
            heapq.heappush(self._due, (time.monotonic_ns() + stream.interval, stream.order.stream, stream))

    def begin(self) -> None:
        """Start all held streams."""
        self.begun = True
        start = time.monotonic_ns() + LEAD_NS
        for stream in self.held:
            self._begin(stream, start)
        self.held.clear()
        self._tick()

    def _begin(self, stream: "Stream", start: int) -> None:
        order = stream.order
        if order.rate is None:
            stream.pump()
        else:
            heapq.heappush(self._due, (start + int(order.phase * 1e9), order.stream, stream))

    def _tick(self) -> None:
        due, lateness = self._due, self.lateness
        now = time.monotonic_ns()
        while due and due[0][0] <= now:
            at, number, stream = due[0]
            lateness.append(now - at)
            if stream.send_one():
                heapq.heapreplace(due, (at + stream.interval, number, stream))
            else:
                heapq.heappop(due)
        asyncio.get_running_loop().call_later(TICK, self._tick)

    def state(self) -> ControlState:
        """Return the control state."""
        late = sorted(self.lateness)
        p50, p99 = percentile(late, 50) / 1e6, percentile(late, 99) / 1e6
        return ControlState(len(self.held), self.finished, round(p50, 3), round(p99, 3))


class Stream:
    """One answer on one connection."""

    def __init__(self, provider: Provider, order: StreamOrder, usage: bool, transport: asyncio.Transport) -> None:
        self.order = order
        self.interval = int(1e9 / order.rate) if order.rate else 0
        self.paused = False
        self._provider = provider
        self._usage = usage
        self._transport = transport
        self._index = 0
        self._first = order.cell
        self._word = word_index(order.stream, 0)

    def send_one(self) -> bool:
        """Stamp and send the next token; return whether there are more."""
        if self._transport.is_closing():  # a client that cancelled, or a producer that was told to
            return False
        index = self._index
        chunk = WORDS[(self._word + index) % len(WORDS)] if index else _content(token(self.order.stream, 0))
        self._provider.cells[self._first + index] = time.monotonic_ns()
        self._transport.write(chunk)
        self._index = index + 1
        if self._index < self.order.tokens:
            return not self._transport.is_closing()
        self._close()
        return False

    def pump(self) -> None:
        """Send without pause until the transport's buffer is full; yield to other streams in between."""
        for _ in range(BURST):
            if not self.send_one() or self.paused:
                return
        asyncio.get_running_loop().call_soon(self.pump)

    def _close(self) -> None:
        end = CLOSING
        if self._usage:
            count = self.order.tokens
            end += _chunk([], {"prompt_tokens": 20, "completion_tokens": count, "total_tokens": 20 + count})
        self._transport.write(end + DONE + b"0\r\n\r\n")
        self._provider.finished += 1


class Connection(asyncio.Protocol):
    """One client's connection; it answers requests one after the other."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._received = b""
        self._stream: Stream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transport does not inherit from it

    def data_received(self, data: bytes) -> None:
        """Answer a request once it is complete."""
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (entry.partition(":") for entry in lines)}
        length = int(headers.get("content-length", "0"))
        if len(body) < length:
            return
        self._received = body[length:]
        self._answer(line, body[:length])

    def _answer(self, line: str, body: bytes) -> None:
        method, path, _ = line.split(" ", 2)
        if path == "/control":
            if method == "POST":
                self._provider.begin()
            self._reply(200, msgspec.json.encode(self._provider.state()))
        elif path.endswith("/chat/completions"):
            self._open(body)
        else:
            self._reply(404, b'{"error":{"message":"not found"}}')

    def _open(self, body: bytes) -> None:
        try:
            asked = msgspec.json.decode(body, type=_ChatRequest)
            order = msgspec.json.decode(_words_of(asked.messages[-1]), type=StreamOrder)
        except (msgspec.DecodeError, IndexError) as error:
            self._reply(400, msgspec.json.encode({"error": {"message": str(error)}}))
            return
        usage = bool((asked.stream_options or {}).get("include_usage"))
        self._stream = Stream(self._provider, order, usage, self._transport)
        self._transport.write(HEAD + OPENING)
        self._provider.add(self._stream)

    def _reply(self, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} -\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)

    def pause_writing(self) -> None:
        """Pause a stream without pace: the reader is behind."""
        if self._stream:
            self._stream.paused = True

    def resume_writing(self) -> None:
        """Resume the stream."""
        if self._stream and self._stream.paused:
            self._stream.paused = False
            if self._stream.order.rate is None:
                self._stream.pump()


def _words_of(message: _Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(str(part.get("text", "")) for part in message.content)


async def serve(port: int, stamps: Path) -> None:
    """Serve until cancelled."""
    provider = Provider(Stamps(stamps))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(provider), "127.0.0.1", port, backlog=4_096)
    gc.freeze()
    gc.disable()  # a garbage collection here would count as latency of the pipeline; runs are short
    async with server:
        await server.serve_forever()


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(description="a provider that stamps its tokens")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--stamps", type=Path, required=True)
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.port, arguments.stamps))


if __name__ == "__main__":
    main()
