"""Readers of a session: one function per transport, with the same request and the same result."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
from google.protobuf.json_format import MessageToDict

from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from services.delivery.formats.multi_cursor import parse_multi_cursor
from tests.support.delivery_server import Stage, delivering
from tests.support.grpc_server import GrpcStage, serving_calls
from tests.support.websocket_client import JSON, MSGPACK, SocketClient, socket

__all__ = ["READERS", "Question", "Reader", "Seen", "Servers", "serving_transports"]


class Servers(NamedTuple):
    """The servers under test: delivery over HTTP, and a second replica over gRPC."""

    stage: Stage
    grpc: GrpcStage


@asynccontextmanager
async def serving_transports(nats_url: str) -> AsyncIterator[Servers]:
    """Run delivery on all its transports while the block runs."""
    async with delivering(nats_url) as stage, serving_calls(nats_url) as grpc:
        yield Servers(stage, grpc)


class Question(NamedTuple):
    """A read request, until the terminal of the generation ``last`` or the end of the stream."""

    session: str
    last: str
    generation: str | None = None
    after: str | None = None
    from_: str | None = None

    @property
    def words(self) -> dict[str, str]:
        """As parameters of a query."""
        named = {"generation": self.generation, "after": self.after, "from": self.from_}
        return {name: value for name, value in named.items() if value is not None}

    def is_answered(self, event: dict[str, Any]) -> bool:
        """Return whether this event is the last requested one."""
        return event["generation"] == self.last and event["type"] in TERMINALS


class Seen(NamedTuple):
    """The result of a read: cursors and events in order, and the number of gaps for a missing beginning.

    ``whole``: the events as they are stored, and not only the part of them that can be compared.
    """

    events: list[tuple[str, dict[str, Any]]]
    gaps: int = 0
    whole: bool = True


Reader = Callable[[Servers, Question], Awaitable[Seen]]
TERMINALS = frozenset({"completed", "failed", "cancelled", "interrupted"})


async def read_sse(servers: Servers, question: Question) -> Seen:
    reader = servers.stage.events(question.session, **question.words)
    async with reader.connected() as connection:
        if connection.status == 204:
            return Seen([])
        await connection.until(lambda client: bool(client.events) and question.is_answered(client.events[-1]))
    gaps = [data for name, data in reader.controls if name == "gap"]
    return Seen(list(zip(reader.ids, reader.events, strict=True)), len(gaps))


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Return lines as NDJSON has them; httpx would also end them at U+2028 and other characters within texts."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line


async def _read_lines(servers: Servers, question: Question, path: str, **query: str) -> Seen:
    found: list[tuple[str, dict[str, Any]]] = []
    gaps = 0
    accept = {"Accept": "application/x-ndjson"}
    url = f"{servers.stage.url}{path}"
    async with servers.stage.http.stream("GET", url, params=question.words | query, headers=accept) as response:
        if response.status_code == 204:
            return Seen([])
        async for line in _lines(response):
            item = json.loads(line)
            gaps += item.get("type") == "gap"
            if "event" not in item:
                continue
            found.append((item["cursor"], item["event"]))
            if question.is_answered(item["event"]):
                break
    return Seen(found, gaps)


async def read_ndjson(servers: Servers, question: Question) -> Seen:
    return await _read_lines(servers, question, f"/v1/sessions/{question.session}/events")


async def read_several(servers: Servers, question: Question) -> Seen:
    """As one of several sessions; the cursor of all of them holds the session's own."""
    if question.generation is not None:
        return await read_ndjson(servers, question)  # several sessions are read whole
    seen = await _read_lines(servers, question, "/v1/events", session=question.session)
    return seen._replace(events=[(_single(cursor), event) for cursor, event in seen.events])


def _single(composite: str) -> str:
    (cursor,) = parse_multi_cursor(composite)
    return f"t1{cursor.partition:02x}{cursor.incarnation}{cursor.session}{cursor.seq:012x}"


async def read_by_polling(servers: Servers, question: Question) -> Seen:
    """In batches of three."""
    found: list[tuple[str, dict[str, Any]]] = []
    gaps = 0
    words = question.words
    url = f"{servers.stage.url}/v1/sessions/{question.session}/events"
    while True:
        query = words | {"wait": "5", "limit": "3"}
        response = await servers.stage.http.get(url, params=query, headers={"Accept": "application/json"})
        batch = response.json()
        gaps += len(batch.get("gaps", []))
        found += [(item["cursor"], item["event"]) for item in batch["events"]]
        if batch.get("ended") or any(question.is_answered(item["event"]) for item in batch["events"]):
            return Seen(found, gaps)
        words = {name: value for name, value in words.items() if name != "from"} | {"after": batch["cursor"]}


async def _read_socket(client: SocketClient, question: Question, acknowledge: bool = False, **wish: Any) -> Seen:
    gaps = 0
    words = {"from_" if name == "from" else name: value for name, value in question.words.items()}
    await client.say("subscribe", session=question.session, **words, **wish)
    while True:
        message = await client.hear()
        if message["type"] == "gap":
            gaps += 1
        if message["type"] == "end":
            break
        if message["type"] != "events":
            continue
        if acknowledge:
            await client.say("ack", session=question.session, cursor=message["events"][-1]["cursor"])
        if question.generation is None and question.is_answered(message["events"][-1]["event"]):
            break
    events = client.events.get(question.session, [])
    return Seen(list(zip(client.cursors.get(question.session, []), events, strict=True)), gaps)


async def read_websocket(servers: Servers, question: Question) -> Seen:
    async with socket(servers.stage.url, JSON) as client:
        return await _read_socket(client, question)


async def read_websocket_event_by_event(servers: Servers, question: Question) -> Seen:
    async with socket(servers.stage.url, JSON) as client:
        return await _read_socket(client, question, acknowledge=True, credit={"events": 1})


async def read_websocket_in_messagepack(servers: Servers, question: Question) -> Seen:
    async with socket(servers.stage.url, MSGPACK) as client:
        seen = await _read_socket(client, question, acknowledge=True, window="auto")
    for _, event in seen.events:
        if isinstance(event.get("binary"), dict):  # content is bytes here: compared by the other transports' test
            del event["binary"]
    return seen._replace(whole=False)


async def read_grpc(servers: Servers, question: Question) -> Seen:
    begin = {None: pb.BEGIN_UNSPECIFIED, "start": pb.BEGIN_START}[question.from_]
    request = pb.ReadRequest(
        session=question.session, generation=question.generation or "", after=question.after or "", begin=begin
    )
    found: list[tuple[str, dict[str, Any]]] = []
    gaps = 0
    async with servers.grpc.client() as client:
        async for response in client.read(request):
            for frame in response.frames:
                gaps += frame.HasField("gap")
                if frame.HasField("event"):
                    found.append((frame.event.cursor, _comparable(frame.event)))
            if found and question.is_answered(found[-1][1]):
                break
    return Seen(found, gaps, whole=False)


async def read_grpc_attach(servers: Servers, question: Question) -> Seen:
    """Over a call with other subscriptions, event by event."""
    begin = {None: pb.BEGIN_UNSPECIFIED, "start": pb.BEGIN_START}[question.from_]
    read = pb.ReadRequest(
        session=question.session, generation=question.generation or "", after=question.after or "", begin=begin
    )
    found: list[tuple[str, dict[str, Any]]] = []
    gaps = 0
    async with servers.grpc.client() as client:
        call = client.attach()
        await call.write(pb.AttachRequest(id="1", subscribe=pb.Subscribe(read=read, credit=pb.Credit(events=1))))
        while not (found and question.is_answered(found[-1][1])):
            response = await call.read()
            for item in response.items:
                if item.HasField("ended"):
                    return Seen(found, gaps, whole=False)
                for frame in item.read.frames:
                    gaps += frame.HasField("gap")
                    if frame.HasField("event"):
                        found.append((frame.event.cursor, _comparable(frame.event)))
                        await call.write(pb.AttachRequest(id="1", ack=pb.Ack(cursor=frame.event.cursor)))
        call.cancel()
    return Seen(found, gaps, whole=False)


def _comparable(event: pb.Event) -> dict[str, Any]:
    """Return the fields of a typed event that have the same names in the log."""
    found: dict[str, Any] = {"type": event.type, "generation": event.generation, "seq": event.seq}
    if event.WhichOneof("kind") == "delta":
        delta = MessageToDict(event.delta, preserving_proto_field_name=True)
        found |= {name: delta[name] for name in ("text", "reasoning") if name in delta}
    return found


READERS: dict[str, Reader] = {
    "sse": read_sse,
    "websocket": read_websocket,
    "websocket, event by event": read_websocket_event_by_event,
    "websocket, MessagePack": read_websocket_in_messagepack,
    "ndjson": read_ndjson,
    "several sessions": read_several,
    "polling": read_by_polling,
    "grpc": read_grpc,
    "grpc, attached": read_grpc_attach,
}
