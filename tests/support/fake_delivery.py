"""A server that speaks delivery's HTTP contract to the console, and fails on demand.

What a page does when a log was truncated, a producer was replaced or a cursor expired is hard to provoke in the real
service within a test; here one call does it. The same page is tested against the real service as well.
"""

import asyncio
import base64
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

CONSOLE = Path(__file__).parents[2] / "services" / "delivery" / "console"
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"
STORY = "The river came down from the hills, turned the wheel once, and went on as if nothing had happened."
WORDS = STORY.split()
Event = dict[str, Any]


class Session:
    """One session's log, its records and its readers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.log: list[Event] = []
        self.records: dict[str, Event] = {}
        self.grown = asyncio.Condition()


class FakeDelivery:
    """The server; attributes and methods are for the test's thread."""

    def __init__(self) -> None:
        self.url = ""
        self.sessions: dict[str, Session] = {}
        self.requests: list[Event] = []
        self.resumed_after: list[str | None] = []
        self.refusal: tuple[int, str] | None = None
        self.repeat_on_resume = 0
        self.pace = 0.01
        self._readers: set[web.StreamResponse] = set()
        self._farewell = ""
        self._released = threading.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def release(self) -> None:
        """Let held generations continue."""
        self._released.set()

    def cut(self) -> None:
        """Break every event connection, as a lost network does."""
        for reader in list(self._readers):
            transport = reader._req.transport if reader._req is not None else None  # type: ignore[attr-defined]
            if transport is not None:
                self.loop.call_soon_threadsafe(transport.abort)

    def dismiss(self, reason: str) -> None:
        """Send ``bye`` to every event connection and end it."""
        self._farewell = reason
        self.loop.call_soon_threadsafe(self._wake)

    def append(self, session: str, event: Event) -> None:
        """Append an event to a session's log."""
        asyncio.run_coroutine_threadsafe(self._append(self._session(session), event), self.loop).result(5)

    def seed(self, session: str, events: list[Event], record: Event | None = None) -> None:
        """Put a finished past into a session."""
        for event in events:
            self.append(session, event)
        if record is not None:
            self._session(session).records[record["generation"]] = record

    def _session(self, name: str) -> Session:
        return self.sessions.setdefault(name, Session(name))

    def _wake(self) -> None:
        for session in self.sessions.values():
            self._keep(self._notify(session))

    def _keep(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _notify(self, session: Session) -> None:
        async with session.grown:
            session.grown.notify_all()

    async def _append(self, session: Session, event: Event) -> None:
        session.log.append(event)
        await self._notify(session)

    async def page(self, _request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": POLICY}
        return web.Response(text=(CONSOLE / "index.html").read_text(), content_type="text/html", headers=headers)

    async def config(self, _request: web.Request) -> web.Response:
        models = [f"scripted/{name}" for name in SCRIPTS]
        return web.json_response({"billing": f"{self.url}/billing", "models": models})

    async def list_sessions(self, _request: web.Request) -> web.Response:
        return web.json_response({"sessions": [_summary(s) for s in reversed(self.sessions.values())], "next": None})

    async def read_session(self, request: web.Request) -> web.Response:
        session = self.sessions.get(request.match_info["session"])
        if session is None:
            return _problem(404, "not-found", "there is no such session")
        return web.json_response({"session": session.name, "generations": list(session.records.values())})

    async def ask(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append({"key": request.headers["Idempotency-Key"], **body})
        script = SCRIPTS.get(body["model"].removeprefix("scripted/"))
        if script is None:
            return _problem(422, "unknown-model", f"model {body['model']!r} is not known")
        session = self._session(request.match_info["session"])
        generation = f"gen_{len(session.records)}_{session.name}"
        session.records[generation] = {
            "generation": generation,
            "state": "queued",
            "model": body["model"],
            "created_at": time.time(),
            "metadata": body.get("metadata", {}),
        }
        self._keep(self._run(session, generation, body, script))
        return web.json_response({"session": session.name, "generation": generation, "state": "queued"}, status=202)

    async def _run(self, session: Session, generation: str, body: Event, script: Any) -> None:
        seq = 0
        record = session.records[generation]
        async for event in script(self, record):
            whole = {"generation": generation, "seq": seq, "epoch": 1, "at": time.time(), **event}
            if event["type"] == "started":
                whole |= {"model": body["model"], "metadata": body.get("metadata", {})}
            record["state"] = event["type"] if event["type"] in ENDS else "running"
            await self._append(session, whole)
            seq += 1

    async def cancel(self, request: web.Request) -> web.Response:
        record = self._session(request.match_info["session"]).records[request.match_info["generation"]]
        record["cancelled"] = True
        return web.json_response({"generation": record["generation"], "state": "cancelling"}, status=202)

    async def events(self, request: web.Request) -> web.StreamResponse:
        after = request.headers.get("Last-Event-ID") or request.query.get("after")
        self.resumed_after.append(after)
        if self.refusal is not None:
            return _problem(*self.refusal)
        session = self._session(request.match_info["session"])
        position = max(0, int(after.removeprefix("c")) - (self.repeat_on_resume if after else 0)) if after else 0
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        self._readers.add(response)
        try:
            await response.write(b"retry: 1000\n\n")
            await self._follow(session, position, response)
        finally:
            self._readers.discard(response)
        return response

    async def _follow(self, session: Session, position: int, response: web.StreamResponse) -> None:
        while True:
            async with session.grown:
                while len(session.log) <= position and not self._farewell:
                    await session.grown.wait()
            if self._farewell:
                reason, self._farewell = self._farewell, ""
                data = json.dumps({"reason": reason, "cursor": f"c{position:012}"})
                await response.write(f"event: bye\ndata: {data}\n\n".encode())
                return
            for event in session.log[position:]:
                position += 1
                await response.write(f"id: c{position:012}\ndata: {json.dumps(event)}\n\n".encode())

    async def usage(self, request: web.Request) -> web.Response:
        name = request.match_info["generation"]
        events = [e for s in self.sessions.values() for e in s.log if e["generation"] == name]
        reported = next((e["usage"] for e in reversed(events) if e["type"] == "usage"), None)
        status = "matched" if reported else "partial"
        counted = events[-1].get("counted", {}) if events else {}
        return web.json_response(
            {
                "generation": name,
                "counted": counted,
                "reported": reported,
                "status": status,
            }
        )

    def app(self) -> web.Application:
        app = web.Application()
        one = "/v1/sessions/{session}"
        app.add_routes(
            [
                web.get("/", self.page),
                web.get("/console/config.json", self.config),
                web.static("/console", CONSOLE),
                web.get("/v1/sessions", self.list_sessions),
                web.get(one, self.read_session),
                web.post(f"{one}/generations", self.ask),
                web.post(f"{one}/generations/{{generation}}/cancel", self.cancel),
                web.get(f"{one}/events", self.events),
                web.get("/billing/v1/usage/generations/{generation}", self.usage),
            ]
        )
        return app

    async def _serve(self, ready: threading.Event) -> None:
        self.loop = asyncio.get_running_loop()
        self.stopping = asyncio.Event()
        runner = web.AppRunner(self.app(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await self.stopping.wait()
        for task in self._tasks:
            task.cancel()
        await runner.cleanup()

    # Scripts: what a model says.

    async def story(self, record: Event) -> AsyncIterator[Event]:
        yield _started()
        for count, word in enumerate(WORDS, 1):
            await asyncio.sleep(self.pace)
            yield {"type": "delta", "text": f"{word} ", "tokens": count}
        yield {"type": "usage", "usage": {"input": 12, "output": len(WORDS), "cached_input": 4}}
        yield _completed(len(WORDS))

    async def held(self, record: Event) -> AsyncIterator[Event]:
        """Half of the story, then nothing until it is released or cancelled."""
        half = len(WORDS) // 2
        yield _started()
        for count, word in enumerate(WORDS[:half], 1):
            yield {"type": "delta", "text": f"{word} ", "tokens": count}
        while not self._released.is_set():
            if record.get("cancelled"):
                yield {"type": "cancelled", "reason": "requested", "counted": {"input": 12, "output": half}}
                return
            await asyncio.sleep(0.01)
        for count, word in enumerate(WORDS[half:], half + 1):
            await asyncio.sleep(self.pace)
            yield {"type": "delta", "text": f"{word} ", "tokens": count}
        yield _completed(len(WORDS))

    async def thinking(self, record: Event) -> AsyncIterator[Event]:
        yield _started()
        yield {"type": "notice", "code": "retrying", "message": "The provider is busy.", "delay": 0.5}
        yield {"type": "delta", "reasoning": "The user wants the weather, so I will call the tool.", "tokens": 11}
        yield {"type": "delta", "text": "Let me look that up.", "tokens": 16}
        arguments = '{"city": "Bern", "days": 3, "units": "metric"}'
        yield {"type": "delta", "tool_call": {"id": "call_7", "name": "forecast", "arguments": ""}, "tokens": 20}
        for start in range(0, len(arguments), 9):
            await asyncio.sleep(self.pace)
            yield {"type": "delta", "tool_call": {"arguments": arguments[start : start + 9]}, "tokens": 21 + start // 9}
        yield {"type": "usage", "usage": {"input": 40, "output": 30, "reasoning": 11}}
        yield {**_completed(30), "finish_reason": "tool_calls"}

    async def everything(self, record: Event) -> AsyncIterator[Event]:
        """Every kind of content, with texts that would be markup or scripts if they were not texts."""
        markup = "<img src=x onerror=\"document.title='run'\">"
        yield _started()
        yield {"type": "delta", "refusal": f"I cannot {markup}.", "tokens": 3}
        half = len(PICTURE) // 2 // 3 * 3
        for start, data in enumerate((PICTURE[:half], PICTURE[half:])):
            piece = {"media_type": "image/png", "data": base64.b64encode(data).decode(), "continues": start > 0}
            yield {"type": "delta", "binary": piece, "tokens": 3}
            await asyncio.sleep(self.pace)
        drawing = base64.b64encode(b"<svg onload='document.title=1'/>").decode()
        yield {"type": "delta", "binary": {"media_type": "image/svg+xml", "data": drawing}, "tokens": 3}
        for number, url in enumerate(("https://h.example/a", "javascript:document.title='run'"), 1):
            source = {"kind": "url_citation", "url": url, "title": f"Source {markup}", "number": number}
            yield {"type": "delta", "annotation": source, "tokens": 3}
        yield {"type": "delta", "extra": {"kind": "executed_tools", "data": [markup]}, "tokens": 3}
        yield {"type": "delta", "signature": {"kind": "thinking", "data": "c2ln"}, "tokens": 3}
        yield _completed(3)

    async def failing(self, record: Event) -> AsyncIterator[Event]:
        yield _started()
        yield {"type": "delta", "text": "So far so good, and then", "tokens": 6}
        yield {
            "type": "failed",
            "code": "upstream_cut_off",
            "message": "the provider's stream ended without its end marker",
            "counted": {"input": 12, "output": 6},
        }

    async def restarting(self, record: Event) -> AsyncIterator[Event]:
        yield _started()
        yield {"type": "delta", "text": "A beginning that nobody keeps.", "tokens": 6}
        yield {"type": "restarted", "epoch": 2, "reason": "producer_lost"}
        yield {"type": "delta", "epoch": 2, "text": "A fresh start.", "tokens": 4}
        yield {**_completed(4), "epoch": 2}


SCRIPTS = {
    "story": FakeDelivery.story,
    "held": FakeDelivery.held,
    "thinking": FakeDelivery.thinking,
    "everything": FakeDelivery.everything,
    "failing": FakeDelivery.failing,
    "restarting": FakeDelivery.restarting,
}
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAQAAAADCAIAAAA7ljmRAAAAEElEQVR4nGNQaDgARww4OQA6dhCB5qeGGQAAAABJRU5ErkJggg=="
)
ENDS = {"completed", "failed", "cancelled", "interrupted"}


def _started() -> Event:
    return {"type": "started", "provider": "scripted", "upstream_model": "words-1", "counted": {"input": 12}}


def _completed(output: int) -> Event:
    counted = {"input": 12, "output": output, "exact": True, "encoding": "o200k_base"}
    return {"type": "completed", "finish_reason": "stop", "counted": counted}


def _summary(session: Session) -> Event:
    records = list(session.records.values())
    last = records[-1] if records else {"state": "completed", "model": ""}
    return {
        "session": session.name,
        "generations": len(records),
        "last_state": last["state"],
        "model": last["model"],
        "updated_at": time.time(),
    }


def _problem(status: int, slug: str, detail: str = "") -> web.Response:
    body = {"type": f"urn:tailrace:problem:{slug}", "title": slug.capitalize(), "status": status, "detail": detail}
    return web.json_response(body, status=status, content_type="application/problem+json")


@contextmanager
def fake_delivery() -> Iterator[FakeDelivery]:
    """Serve on a free loopback port in a thread of its own."""
    server = FakeDelivery()
    ready = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(server._serve(ready)), name="delivery-stand-in")
    thread.start()
    assert ready.wait(10)
    yield server
    server.loop.call_soon_threadsafe(server.stopping.set)
    thread.join(10)
