"""An OpenAI-compatible provider that records the text that it sends.

Run as ``python -m bench.chaos.provider --port N --record FILE``. The last message's text is an `Order`. Each call's
tokens contain the call's name, so that mixed text of two calls is detected.
"""

import argparse
import asyncio
import contextlib
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop
from aiohttp import web

from bench.chaos.history import Sent, SentEnd
from bench.chaos.schedule import Ending

__all__ = ["Order", "Provider", "main", "text_of"]

BURST: Final = 32
PADDING: Final = " and so it goes on"


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """Instructions of one generation to the provider, sent as the text of the user's message."""

    key: str
    tokens: int
    rate: float | None = None
    ending: Ending = "end"
    refusals: int = 0
    size: int = 0


class _Message(msgspec.Struct):
    content: str


class _Asked(msgspec.Struct):
    messages: list[_Message]
    stream_options: dict[str, Any] | None = None


def text_of(key: str, call: int, first: int, count: int, size: int = 0) -> str:
    """Return tokens ``first`` … of a call, joined, each of at least ``size`` characters."""
    tokens = (f" {call}:{n}" if n else f"[{key}/{call}]" for n in range(first, first + count))
    return "".join(token + (PADDING * (size // len(PADDING) + 1))[: max(0, size - len(token))] for token in tokens)


class Provider:
    """Answer calls and record them."""

    def __init__(self, record: Path) -> None:
        self._file = record.open("ab", buffering=0)
        self._calls: dict[str, int] = {}

    def _note(self, record: Sent | SentEnd) -> None:
        self._file.write(msgspec.json.encode(record) + b"\n")

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer one call according to its order."""
        asked = msgspec.json.decode(await request.read(), type=_Asked)
        order = msgspec.json.decode(asked.messages[-1].content, type=Order)
        call = self._calls[order.key] = self._calls.get(order.key, 0) + 1
        if call <= order.refusals:
            self._note(SentEnd(key=order.key, call=call, how="refused"))
            return web.json_response({"error": {"message": "overloaded"}}, status=503)
        how = "left"
        try:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            await self._stream(response, order, call)
            how = await self._end(response, order, usage=bool((asked.stream_options or {}).get("include_usage")))
        except OSError:
            pass
        finally:
            self._note(SentEnd(key=order.key, call=call, how=how))
        if how == "cut" and request.transport is not None:
            request.transport.abort()
        return response

    async def _stream(self, response: web.StreamResponse, order: Order, call: int) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        step = 1 if order.rate else BURST
        wanted = order.tokens if order.ending == "end" else order.tokens // 2
        for first in range(0, wanted, step):
            if order.rate:
                await asyncio.sleep(begun + first / order.rate - loop.time())
            text = text_of(order.key, call, first, min(step, wanted - first), order.size)
            self._note(Sent(key=order.key, call=call, text=text))
            await response.write(_chunk([{"index": 0, "delta": {"content": text}, "finish_reason": None}]))

    async def _end(self, response: web.StreamResponse, order: Order, *, usage: bool) -> str:
        if order.ending == "cut":
            return "cut"
        if order.ending == "error":
            await response.write(b'data: {"error":{"message":"the model broke","type":"server_error"}}\n\n')
            return "error"
        end = _chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}])
        if usage:
            n = order.tokens
            end += _chunk([], {"prompt_tokens": 20, "completion_tokens": n, "total_tokens": 20 + n})
        await response.write(end + b"data: [DONE]\n\n")
        with contextlib.suppress(OSError):  # the producer may have closed the connection
            await response.write_eof()
        return "end"


def _chunk(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}
    return b"data: " + msgspec.json.encode(body | {"usage": usage}) + b"\n\n"


async def serve(port: int, record: Path) -> None:
    """Serve until cancelled."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", Provider(record).answer)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(description="a provider that writes down what it sends")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--record", type=Path, required=True)
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(arguments.port, arguments.record))


if __name__ == "__main__":
    main()
