"""How a session is read over each transport: one function for each, with the same question and the same answer."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict

from schemas.rpc.tailrace.v1 import tailrace_pb2 as pb
from tests.delivery_stage import Stage, delivering
from tests.grpc_stage import GrpcStage, serving_calls
from tests.websocket_client import JSON, MSGPACK, SocketClient, socket

__all__ = ["READERS", "Question", "Reader", "Seen", "Stand", "standing"]


class Stand(NamedTuple):
    """What answers: delivery over HTTP, and a second replica of it over gRPC."""

    stage: Stage
    grpc: GrpcStage


@asynccontextmanager
async def standing(nats_url: str) -> AsyncIterator[Stand]:
    """Run delivery on all its transports while the block runs."""
    async with delivering(nats_url) as stage, serving_calls(nats_url) as grpc:
        yield Stand(stage, grpc)


class Question(NamedTuple):
    """What to read, until the terminal of the generation ``last`` is there, or nothing follows."""

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
        """Tell whether this event is the last one that is asked for."""
        return event["generation"] == self.last and event["type"] in TERMINALS


class Seen(NamedTuple):
    """What a reader got: cursors and events in their order, and how often a missing beginning was mentioned.

    ``whole``: the events as they are stored, and not only the part of them that can be compared.
    """

    events: list[tuple[str, dict[str, Any]]]
    gaps: int = 0
    whole: bool = True


Reader = Callable[[Stand, Question], Awaitable[Seen]]
TERMINALS = frozenset({"completed", "failed", "cancelled", "interrupted"})


async def read_sse(stand: Stand, question: Question) -> Seen:
    reader = stand.stage.events(question.session, **question.words)
    async with reader.connected() as connection:
        if connection.status == 204:
            return Seen([])
        await connection.until(lambda client: bool(client.events) and question.is_answered(client.events[-1]))
    gaps = [data for name, data in reader.controls if name == "gap"]
    return Seen(list(zip(reader.ids, reader.events, strict=True)), len(gaps))


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


async def read_websocket(stand: Stand, question: Question) -> Seen:
    async with socket(stand.stage.url, JSON) as client:
        return await _read_socket(client, question)


async def read_websocket_event_by_event(stand: Stand, question: Question) -> Seen:
    async with socket(stand.stage.url, JSON) as client:
        return await _read_socket(client, question, acknowledge=True, credit={"events": 1})


async def read_websocket_in_messagepack(stand: Stand, question: Question) -> Seen:
    async with socket(stand.stage.url, MSGPACK) as client:
        seen = await _read_socket(client, question, acknowledge=True, window="auto")
    for _, event in seen.events:
        if isinstance(event.get("binary"), dict):  # content is bytes here: compared by the other transports' test
            del event["binary"]
    return seen._replace(whole=False)


async def read_grpc(stand: Stand, question: Question) -> Seen:
    begin = {None: pb.BEGIN_UNSPECIFIED, "start": pb.BEGIN_START}[question.from_]
    request = pb.ReadRequest(
        session=question.session, generation=question.generation or "", after=question.after or "", begin=begin
    )
    found: list[tuple[str, dict[str, Any]]] = []
    gaps = 0
    async with stand.grpc.client() as client:
        async for response in client.read(request):
            for frame in response.frames:
                gaps += frame.HasField("gap")
                if frame.HasField("event"):
                    found.append((frame.event.cursor, _comparable(frame.event)))
            if found and question.is_answered(found[-1][1]):
                break
    return Seen(found, gaps, whole=False)


def _comparable(event: pb.Event) -> dict[str, Any]:
    """Return the fields of a typed event that stand under the same names in the log."""
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
    "grpc": read_grpc,
}
