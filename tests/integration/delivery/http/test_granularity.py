"""Granularity over HTTP: fewer events, the same text, cursors that hold in every granularity."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from schemas.events import AnyEvent, Completed, Delta, Started
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, Stage, delivering, story
from tests.support.sse_client import SseClient

WISHES: list[dict[str, str]] = [
    {},
    {"granularity": "token"},
    {"granularity": "line"},
    {"granularity": "sentence"},
    {"coalesce": "10"},
    {"coalesce": "200"},
]
SAID = [
    word + end
    for line in range(12)
    for word, end in zip(f"Line {line} has words. And more than that!".split(), [" "] * 7 + ["\n"], strict=True)
]
TEXT = "".join(SAID)


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url) as running:
        yield running
        await running.settled()


@pytest.fixture
def log(broker: Broker) -> Log:
    return Log(broker)


def answer(generation: str = "g1", said: list[str] = SAID) -> list[AnyEvent]:
    """Return a complete answer with these tokens."""
    events: list[AnyEvent] = [
        Started(generation=generation, seq=0, model="m", provider="scripted", upstream_model="story")
    ]
    events += [Delta(generation=generation, seq=n, text=text, tokens=n) for n, text in enumerate(said, 1)]
    return [*events, Completed(generation=generation, seq=len(said) + 1, finish_reason="stop")]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event.get("text", "") for event in events)


def is_whole(client: SseClient) -> bool:
    return bool(client.events) and client.events[-1]["type"] == "completed"


@pytest.mark.parametrize("wish", WISHES, ids=str)
async def test_text_is_the_same_live_and_replayed(stage: Stage, log: Log, wish: dict[str, str]) -> None:
    live = stage.events(**wish, **{"from": "start"})
    async with live.connected() as connection:
        writing = asyncio.create_task(log.append(*answer(), pause=0.002))
        assert await connection.until(is_whole)
        await writing
    replayed = stage.events(generation="g1", **wish)
    assert await replayed.read_all() == 200
    for reader in (live, replayed):
        assert text_of(reader.events) == TEXT
        assert reader.ids == sorted(set(reader.ids))


async def test_line_and_sentence_are_one_event_each(stage: Stage, log: Log) -> None:
    await log.append(*answer())
    lines = stage.events(generation="g1", granularity="line")
    await lines.read_all()
    assert [e["text"] for e in lines.events[1:-1]] == TEXT.splitlines(keepends=True)
    assert [e["seq"] for e in lines.events[1:-1]] == list(range(1, len(SAID) + 1, 8))
    assert [e["through"] for e in lines.events[1:-1]] == list(range(8, len(SAID) + 1, 8))
    sentences = stage.events(generation="g1", granularity="sentence")
    await sentences.read_all()
    assert len(sentences.events) == 2 + 2 * 12


async def test_every_cursor_of_every_granularity_is_valid_in_every_other(stage: Stage, log: Log) -> None:
    said = ["One. Two", "! Th", "ree\nFo", "ur. 五。六", "\n\n", "Se", "ven"]
    await log.append(*answer("g1", said))
    whole = "".join(said)
    for wish in WISHES[2:5]:
        first = stage.events(generation="g1", **wish)
        await first.read_all()
        for position, cursor in enumerate(first.ids[:-1], 1):
            for other in WISHES[1:5]:
                rest = stage.events(generation="g1", after=cursor, **other)
                assert await rest.read_all() == 200
                assert text_of(first.events[:position]) + text_of(rest.events) == whole, (wish, cursor, other)


@pytest.mark.parametrize("seed", range(4))
async def test_reconnecting_in_any_granularity_misses_and_repeats_nothing(stage: Stage, log: Log, seed: int) -> None:
    rng = random.Random(seed)
    writing = asyncio.create_task(log.append(*answer(said=SAID * 2), pause=0.003))
    client = stage.events(**{"from": "start"})
    async with asyncio.timeout(30):
        while not is_whole(client):
            client.query = {"from": "start"} | rng.choice(WISHES)
            async with client.connected() as connection:
                enough = len(client.events) + rng.randint(0, 12)
                await connection.until(lambda c, enough=enough: len(c.events) >= enough or is_whole(c))
    await writing
    assert text_of(client.events) == TEXT * 2
    assert client.ids == sorted(set(client.ids))


async def test_subscribers_of_all_granularities_read_one_feed_at_once(stage: Stage, log: Log) -> None:
    clients = [stage.events(**{"from": "start"}, **wish) for wish in WISHES for _ in range(3)]
    reading = [asyncio.create_task(client.follow(is_whole)) for client in clients]
    await log.append(*answer()[:20])
    late = [stage.events(**{"from": "start"}, **wish) for wish in WISHES]
    reading += [asyncio.create_task(client.follow(is_whole)) for client in late]
    await log.append(*answer()[20:], pause=0.002)
    async with asyncio.timeout(20):
        await asyncio.gather(*reading)
    for client in clients + late:
        assert text_of(client.events) == TEXT


async def test_text_is_joined_once_for_all_subscribers_of_a_granularity(
    stage: Stage, log: Log, monkeypatch: Any
) -> None:
    from services.delivery.formats.sse import ServerSentEvents

    framed: list[bytes] = []
    original = ServerSentEvents.frame

    def counting(self: Any, entry: Any, at: Any) -> bytes:
        framed.append(entry.data)
        return original(self, entry, at)

    clients = [stage.events(**{"from": "live"}, granularity="line") for _ in range(20)]
    reading = [asyncio.create_task(client.follow(is_whole)) for client in clients]
    feed = await stage.replica.feeds.feed("default", "s")
    await eventually(lambda: len(feed.subscribers) == 20)
    monkeypatch.setattr(ServerSentEvents, "frame", counting)
    await log.append(*answer())
    await asyncio.gather(*reading)
    assert len(framed) == len(clients[0].events)
    assert all(text_of(client.events) == TEXT for client in clients)


async def test_held_text_is_sent_after_a_delay_without_a_boundary(stage: Stage, log: Log) -> None:
    client = stage.events(**{"from": "start"}, granularity="line")
    async with client.connected() as connection:
        await log.append(*answer(said=["no ", "end ", "here"])[:4])
        async with asyncio.timeout(10):
            assert await connection.until(lambda c: text_of(c.events) == "no end here")


async def test_coalesce_sends_fewer_events(stage: Stage, log: Log) -> None:
    client = stage.events(**{"from": "start"}, coalesce="5000")
    async with client.connected() as connection:
        await log.append(*answer())
        assert await connection.until(is_whole)
    assert len(client.events) < len(SAID) / 2
    assert text_of(client.events) == TEXT


@pytest.mark.parametrize("wish", WISHES[2:], ids=str)
async def test_all_events_pass_through_a_feed_with_a_small_tail(
    broker: Broker, nats_server: NatsServer, wish: dict[str, str]
) -> None:
    said = [f"{n} ".ljust(3_000, "x") + ("\n" if n % 3 == 0 else " ") for n in range(120)]
    async with delivering(nats_server.url, feed_bytes=65_536) as stage:
        client = stage.events(**{"from": "start"}, **wish)
        writing = asyncio.create_task(Log(broker).append(*answer(said=said)))
        async with asyncio.timeout(30):
            while not is_whole(client):
                async with client.connected() as connection:
                    enough = len(client.events) + 7
                    await connection.until(lambda c, enough=enough: len(c.events) >= enough or is_whole(c))
        await writing
        assert text_of(client.events) == "".join(said)


async def test_other_generations_are_filtered_out_of_joined_text(stage: Stage, log: Log) -> None:
    one, two = answer("g1"), answer("g2", ["other "] * len(SAID))
    await log.append(*[event for pair in zip(one, two, strict=True) for event in pair])
    client = stage.events(generation="g1", granularity="sentence")
    assert await client.read_all() == 200
    assert text_of(client.events) == TEXT
    assert {event["generation"] for event in client.events} == {"g1"}


async def test_bye_inside_an_event_names_a_cursor_inside_of_it(stage: Stage, log: Log) -> None:
    client = stage.events(**{"from": "start"}, granularity="sentence")
    async with client.connected() as connection:
        await log.append(*answer(said=["One. Tw", "o."])[:2])
        assert await connection.count(2)
        drained = asyncio.create_task(stage.replica.drain(5))
        await connection.to_the_end()
        await drained
    assert client.controls == [("bye", {"reason": "drain", "cursor": client.ids[-1]})]
    assert "." in client.ids[-1]


async def test_joined_events_over_ndjson_have_the_same_form(stage: Stage, log: Log) -> None:
    await log.append(*answer())
    sse = stage.events(generation="g1", granularity="sentence")
    await sse.read_all()
    response = await stage.http.get(
        sse.url, params={"generation": "g1", "granularity": "sentence"}, headers={"Accept": "application/x-ndjson"}
    )
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [(line["cursor"], line["event"]) for line in lines] == list(zip(sse.ids, sse.events, strict=True))


async def test_granularity_token_equals_the_stored_events(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    plain, token = stage.events(generation="g1"), stage.events(generation="g1", granularity="token")
    await plain.read_all()
    await token.read_all()
    assert (plain.ids, plain.events) == (token.ids, token.events)


@pytest.mark.parametrize("query", [{"granularity": "word"}, {"coalesce": "5"}, {"coalesce": "x"}, {"coalesce": "5001"}])
async def test_granularities_that_do_not_exist_are_refused(stage: Stage, query: dict[str, str]) -> None:
    response = await stage.http.get(f"{stage.url}/v1/sessions/s/events", params=query)
    assert response.status_code == 400
    assert "granularity" in response.text or "coalesce" in response.text
