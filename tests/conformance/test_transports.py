"""Run the vectors: one session read over all transports gives the same events with the same cursors."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from schemas.codec import encode_event
from schemas.events import Completed, Started
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import TENANT, Log
from tests.support.transport_readers import READERS, Question, Seen, Servers, serving_transports

VECTORS = sorted((Path(__file__).parents[2] / "schemas/vectors/transports").glob("*.json"))
SENTINEL = "last"  # a generation behind everything else: who has seen its end has seen all


def vector(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def stored(event: dict[str, Any]) -> bytes:
    if "raw" in event:
        return str(event["raw"]).encode()
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


@pytest.fixture
async def servers(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Servers]:
    async with serving_transports(nats_server.url) as running:
        yield running


async def write(broker: Broker, session: str, events: list[dict[str, Any]]) -> list[int]:
    log = Log(broker, session)
    places = [await log.append_bytes(event["generation"], stored(event)) for event in events]
    start = Started(generation=SENTINEL, seq=0, model="m", provider="p", upstream_model="u")
    for event in (start, Completed(generation=SENTINEL, seq=1, finish_reason="stop")):
        await log.append_bytes(SENTINEL, encode_event(event))
    return places


async def question_of(servers: Servers, session: str, read: dict[str, Any], places: list[int]) -> Question:
    issuer = await servers.stage.replica.states.issuer(TENANT, session)
    generation = read.get("generation")
    after = issuer.issue(places[read["after"]]) if "after" in read else None
    return Question(session, generation or SENTINEL, generation, after, read.get("from"))


def check(seen: Seen, read: dict[str, Any], log: list[dict[str, Any]], cursors: list[str] | None, said: str) -> None:
    found = [(cursor, event) for cursor, event in seen.events if event["generation"] != SENTINEL]
    wanted = [log[index] for index in read["gives"]]
    assert [(e["generation"], e["seq"], e["type"]) for _, e in found] == [
        (e["generation"], e["seq"], e["type"]) for e in wanted
    ], said
    for (_, event), expected in zip(found, wanted, strict=True):
        assert event == expected if seen.whole else event.items() <= expected.items(), said
    if cursors is not None:
        assert [cursor for cursor, _ in found] == cursors, said
    assert seen.gaps == (1 if read.get("headless") else 0), said


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
async def test_stored_events_are_identical_over_every_transport(servers: Servers, broker: Broker, path: Path) -> None:
    case = vector(path)
    places = await write(broker, "s", case["log"])
    issuer = await servers.stage.replica.states.issuer(TENANT, "s")
    for read in case["reads"]:
        question = await question_of(servers, "s", read, places)
        cursors = [issuer.issue(places[index]) for index in read["gives"]]
        for name, reader in READERS.items():
            async with asyncio.timeout(20):
                seen = await reader(servers, question)
            check(seen, read, case["log"], cursors, f"{name}: {read}")


# A zombie that is all there is of its generation cannot be told from it: only what is stored behind it shows that.
LIVE = [path for path in VECTORS if path.stem != "beginning-expired-later-epoch"]


@pytest.mark.parametrize("path", LIVE, ids=lambda path: path.stem)
async def test_live_events_are_identical_over_every_transport(servers: Servers, broker: Broker, path: Path) -> None:
    case = vector(path)
    read = next(read for read in case["reads"] if read.get("from") == "start")
    question = Question("s", SENTINEL, from_="start")
    async with asyncio.timeout(30):
        readers = {name: asyncio.create_task(reader(servers, question)) for name, reader in READERS.items()}
        await eventually(lambda: listening(servers) == len(READERS))
        places = await write(broker, "s", case["log"])
        issuer = await servers.stage.replica.states.issuer(TENANT, "s")
        cursors = [issuer.issue(places[index]) for index in read["gives"]]
        for name, task in readers.items():
            check(await task, read, case["log"], cursors, f"{name}, live")


def listening(servers: Servers) -> int:
    return sum(len(feed.everyone()) for one in (servers.stage, servers.grpc) for feed in one.replica.feeds.all())


def test_vectors_reference_only_events_of_their_own_log() -> None:
    assert len(VECTORS) >= 10
    for path in VECTORS:
        case = vector(path)
        assert case["about"].endswith(".")
        for read in case["reads"]:
            assert all(0 <= index < len(case["log"]) for index in read["gives"]), path.name
            assert read["gives"] == sorted(set(read["gives"])), path.name
