"""Test answers with content other than text, from a provider's HTTP stream to the log and the lookup."""

import base64
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from schemas.codec import decode_event, encode_event
from schemas.events import AnyEvent, Completed, Delta, is_terminal
from schemas.subjects import Address, token_subject
from schemas.topology import token_stream
from services.delivery.requests.transcript import Transcript
from services.kit.jetstream.broker import Broker
from services.producer.core.bounds import EVENT_BYTES
from tests.conftest import eventually
from tests.support.producer_worker import accepted_log, ask, enqueue, producing
from tests.support.provider_server import Provider, Replay, providing


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "x", "created": 1, "model": "m", "choices": [choice]}).encode() + b"\n\n"


@asynccontextmanager
async def answering(*chunks: bytes) -> AsyncIterator[tuple[Provider, dict[str, Any]]]:
    wire = b"".join([*chunks, chunk({}, "stop"), b"data: [DONE]\n\n"])
    async with providing(Replay.of(wire, 65_536)) as provider:
        yield provider, {"providers": {"own": {"dialect": "openai", "base_url": f"{provider.url}/v1"}}}


async def logged(broker: Broker, *chunks: bytes) -> list[AnyEvent]:
    request = ask("g1", "own/model", params={})
    async with answering(*chunks) as (_, config), producing(broker, config=config):
        await enqueue(broker, request)

        async def ended() -> bool:
            last = await broker.last(token_stream(0), token_subject(Address.of("default", "s", "g1", 1)))
            return last is not None and is_terminal(decode_event(last.data))

        await eventually(ended, timeout=60)
        return await accepted_log(broker, request)


async def test_an_11_megabyte_image_is_stored_in_pieces_and_reassembled(broker: Broker) -> None:
    picture = random.Random(5).randbytes(11 * 1024 * 1024)
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    events = await logged(
        broker,
        chunk({"content": "Here: "}),
        chunk({"images": [{"type": "image_url", "image_url": {"url": url}}]}),
        chunk({"content": "Done."}),
    )
    assert isinstance(events[-1], Completed)
    assert max(len(encode_event(event)) for event in events) <= EVENT_BYTES
    deltas = [event for event in events if isinstance(event, Delta)]
    assert b"".join(d.binary.data for d in deltas if d.binary) == picture
    assert [d.text for d in deltas if d.text] == ["Here: ", "Done."]
    assert [d.binary.continues for d in deltas if d.binary].count(False) == 1


async def test_tool_calls_refusals_and_annotations_are_in_the_lookup(broker: Broker) -> None:
    calls = [{"index": 0, "id": i, "function": {"name": "get_weather", "arguments": {"city": i}}} for i in "ab"]
    source = {"type": "url_citation", "url_citation": {"url": "https://h.example", "title": "H"}}
    events = await logged(
        broker,
        chunk({"refusal": "I cannot", "annotations": [source]}),
        chunk({"tool_calls": calls[:1]}),
        chunk({"tool_calls": calls[1:]}),
    )
    lookup = Transcript()
    for event in events:
        lookup.offer(encode_event(event))
    assert isinstance(lookup.terminal, Completed)
    assert (lookup.text, lookup.refusal) == ("", "I cannot")
    assert [(c.index, c.id, c.arguments) for c in lookup.tool_calls] == [
        (0, "a", '{"city":"a"}'),
        (1, "b", '{"city":"b"}'),
    ]
    assert [(a.url, a.title) for answer in lookup.answers for a in answer.annotations] == [("https://h.example", "H")]
