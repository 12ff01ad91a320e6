"""A small HTTP server with delivery's contract and configurable faults; real sockets, scripted content."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from schemas.codec import encode_event
from schemas.events import Cancelled, Completed, Delta, Event, Started
from schemas.usage import Counted

GENERATION = "gen_1"


def story(*texts: str, end: Event | None = None) -> list[Event]:
    """A generation that emits these texts and then ends."""
    deltas = [Delta(generation=GENERATION, seq=n, text=text) for n, text in enumerate(texts, start=1)]
    started = Started(generation=GENERATION, seq=0, model="scripted/story", provider="scripted", upstream_model="story")
    ending = end or Completed(
        generation=GENERATION, seq=0, finish_reason="stop", counted=Counted(output=len(texts), exact=True)
    )
    ending.seq = len(texts) + 1
    return [started, *deltas, ending]


class Delivery:
    """A running server and its faults.

    ``cuts``: total numbers of events after which the connections, in order, are broken (empty: never).
    ``repeat``: resumed connections begin with an event that was sent before. ``until_cancelled``: the last event waits
    for a cancel request and is then ``cancelled``. ``problem``: the response to POST instead. ``byes``: number of
    connections that end with a ``bye`` after one event.
    """

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.cuts: list[int] = []
        self.byes = 0
        self.repeat = False
        self.until_cancelled = False
        self.problem: tuple[int, dict[str, Any]] | None = None
        self.busy = 0
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.resumed_from: list[str | None] = []
        self.documents: dict[str, Any] = {}
        self.cancels: list[str] = []
        self.deleted: list[str] = []
        self.cancelled = threading.Event()
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    delivery: Delivery

    def log_message(self, *_args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        if self.path.endswith("/cancel"):
            self.delivery.cancels.append(self.path.split("/")[-2])
            self.delivery.cancelled.set()
            return self._json(202, {"generation": self.path.split("/")[-2], "state": "cancelling"})
        if self.delivery.problem is not None:
            return self._json(*self.delivery.problem)
        session = self.path.split("/")[3]
        self.delivery.asked.append(body)
        self.delivery.keys.append(self.headers.get("idempotency-key"))
        return self._json(202, {"session": session, "generation": GENERATION, "cursor": "c0", "state": "queued"})

    def do_DELETE(self) -> None:
        self.delivery.deleted.append(self.path)
        if self.delivery.problem is not None:
            return self._json(*self.delivery.problem)
        self.send_response(204)
        self.send_header("content-length", "0")
        self.end_headers()
        return None

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path.endswith("/events"):
            return self._events(parse_qs(url.query))
        document = self.delivery.documents.get(url.path)
        if document is None:
            return self._json(404, {"type": "urn:tailrace:problem:not-found", "title": "There is no such thing"})
        return self._json(200, document)

    def _json(self, status: int, document: object) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _events(self, query: dict[str, list[str]]) -> None:
        delivery = self.delivery
        cursor = self.headers.get("last-event-id") or query.get("after", [None])[0]
        delivery.resumed_from.append(cursor)
        if delivery.busy:
            delivery.busy -= 1
            return self._json(503, {"title": "Not available at the moment"})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        self._write("retry: 1000\n\n: hb\n\n")
        first = int(cursor[1:]) if cursor else 0
        if delivery.repeat and first > 0:
            first -= 1
        return self._stream(first, bye=delivery.byes > 0, cut=delivery.cuts.pop(0) if delivery.cuts else None)

    def _stream(self, first: int, *, bye: bool, cut: int | None) -> None:
        for number, event in enumerate(self.delivery.events[first:], start=first + 1):
            if cut is not None and number > cut:
                half = f"id: c{number}\ndata: {encode_event(event).decode()[:20]}"
                self._write(half)  # even half an event is lost with its connection
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if number == len(self.delivery.events) and self.delivery.until_cancelled:
                self.delivery.cancelled.wait(20)
                self._event(number, Cancelled(generation=GENERATION, seq=event.seq, reason="requested"))
                return
            self._event(number, event)
            if bye:
                self.delivery.byes -= 1
                self._write('event: bye\ndata: {"reason":"drain"}\n\n')
                return

    def _event(self, number: int, event: Event) -> None:
        self._write(f"id: c{number}\ndata: {encode_event(event).decode()}\n\n")

    def _write(self, text: str) -> None:
        try:
            self.wfile.write(text.encode())
            self.wfile.flush()
        except ConnectionError:
            self.close_connection = True  # the client has left


@contextmanager
def serving(delivery: Delivery) -> Iterator[Delivery]:
    """Serve on a free loopback port while the block runs."""
    handler = type("Handler", (_Handler,), {"delivery": delivery})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    delivery.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield delivery
    finally:
        delivery.cancelled.set()
        server.shutdown()
        thread.join()
        server.server_close()
