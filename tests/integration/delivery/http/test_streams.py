"""Streams of a session's events: replay, joining, resuming, filters and refusals, over real HTTP and a real broker."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from schemas.events import Completed, Delta, Interrupted, Restarted, Started
from services.kit.jetstream.broker import Broker
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import Log, Stage, delivering, interleaved, keys, metric, story


@pytest.fixture
async def stage(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Stage]:
    async with delivering(nats_server.url) as running:
        yield running
        await running.settled()


@pytest.fixture
def log(broker: Broker) -> Log:
    return Log(broker)


async def test_replay_of_a_finished_generation_is_the_log_byte_for_byte(stage: Stage, log: Log) -> None:
    events = story("g1")
    await log.append(*events)
    reader = stage.events(generation="g1")
    assert await reader.read_all() == 200
    assert keys(reader.events) == keys(events)
    assert reader.retry == 1000
    assert len(set(reader.ids)) == len(reader.ids)
    assert reader.ids == sorted(reader.ids)


async def test_response_headers_forbid_buffering_and_caching(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with stage.events(generation="g1").connected() as reader:
        assert reader.response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert reader.response.headers["cache-control"] == "no-store"
        assert reader.response.headers["x-accel-buffering"] == "no"


async def test_session_stream_stays_open_for_the_next_generation(stage: Stage, log: Log) -> None:
    first, second = story("g1"), story("g2")
    await log.append(*first)
    reader = stage.events()
    async with reader.connected() as connection:
        assert await connection.count(len(first))
        await log.append(*second)
        assert await connection.count(len(first) + len(second))
    assert keys(reader.events) == keys(first + second)


async def test_default_start_is_the_latest_generation(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"), *story("g2"))
    reader = stage.events()
    async with reader.connected() as connection:
        assert await connection.count(13)
    assert keys(reader.events) == keys(story("g2"))


async def test_default_start_is_the_running_generation_even_if_a_later_one_has_ended(stage: Stage, log: Log) -> None:
    running, ended = story("g1"), story("g2")
    await log.append(*running[:4], *ended)
    reader = stage.events()
    async with reader.connected() as connection:
        assert await connection.count(4 + len(ended))
        await log.append(*running[4:])
        assert await connection.count(len(running) + len(ended))
    assert keys(reader.events) == keys(running[:4] + ended + running[4:])


async def test_from_start_replays_every_generation(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"), *story("g2"))
    reader = stage.events(**{"from": "start"})
    async with reader.connected() as connection:
        assert await connection.count(26)
    assert keys(reader.events) == keys(story("g1") + story("g2"))


async def test_from_live_skips_stored_events(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    reader = stage.events(**{"from": "live"})
    async with reader.connected() as connection:
        await log.append(*story("g2"))
        assert await connection.count(13)
    assert keys(reader.events) == keys(story("g2"))


async def test_from_live_of_an_ended_generation_has_nothing_to_wait_for(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    async with asyncio.timeout(5):
        assert await stage.events(**{"from": "live", "generation": "g1"}).read_all() == 204


async def test_generation_stream_ends_after_its_terminal_while_the_session_continues(stage: Stage, log: Log) -> None:
    mixed = interleaved(random.Random(1), story("g1"), story("g2", 40))
    reader = stage.events(generation="g1")
    await log.append(mixed[0])
    if mixed[0].generation != "g1":
        await log.append(story("g1")[0])
        mixed.remove(next(e for e in mixed if e.generation == "g1"))
    task = asyncio.create_task(reader.read_all())
    await log.append(*mixed[1:])
    async with asyncio.timeout(10):
        assert await task == 200
    assert keys(reader.events) == keys(story("g1"))


async def test_resume_at_every_cursor_continues_at_the_next_event(stage: Stage, log: Log) -> None:
    events = story("g1") + story("g2")
    await log.append(*events)
    whole = stage.events(**{"from": "start"})
    async with whole.connected() as connection:
        assert await connection.count(len(events))
    for position, cursor in enumerate(whole.ids[:-1], 1):
        again = stage.events(after=cursor)
        async with again.connected() as connection:
            assert await connection.count(len(events) - position)
        assert keys(again.events) == keys(events[position:])
        assert again.ids == whole.ids[position:]


async def test_resume_of_a_generation_at_every_cursor_ends_with_it(stage: Stage, log: Log) -> None:
    events = story("g1")
    await log.append(*events)
    whole = stage.events(generation="g1")
    await whole.read_all()
    for position, cursor in enumerate(whole.ids[:-1], 1):
        again = stage.events(generation="g1", after=cursor)
        assert await again.read_all() == 200
        assert keys(again.events) == keys(events[position:])


async def test_resume_after_the_terminal_is_204(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    reader = stage.events(generation="g1")
    assert await reader.read_all() == 200
    assert await reader.read_all() == 204


async def test_last_event_id_wins_over_after(stage: Stage, log: Log) -> None:
    await log.append(*story("g1"))
    whole = stage.events(generation="g1")
    await whole.read_all()
    again = stage.events(generation="g1", after=whole.ids[0])
    again.last_id = whole.ids[8]
    await again.read_all()
    assert again.ids == whole.ids[9:]


@pytest.mark.parametrize("seed", range(6))
async def test_joining_at_any_moment_misses_nothing_and_repeats_nothing(stage: Stage, log: Log, seed: int) -> None:
    rng = random.Random(seed)
    events = interleaved(rng, story("g1", 120), story("g2", 80)) + story("g3", 40)
    readers = [stage.events(**{"from": "start"}) for _ in range(12)]

    async def join(after: float, reader) -> None:  # type: ignore[no-untyped-def]
        await asyncio.sleep(after)
        async with reader.connected() as connection:
            assert await connection.count(len(events))

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(log.append(*events))
        for reader in readers:
            group.create_task(join(rng.uniform(0, 0.4), reader))
    for reader in readers:
        assert keys(reader.events) == keys(events)


@pytest.mark.parametrize("seed", range(4))
async def test_resuming_at_any_moment_misses_nothing_and_repeats_nothing(stage: Stage, log: Log, seed: int) -> None:
    rng = random.Random(seed)
    events = interleaved(rng, story("g1", 150), story("g2", 150))

    async def flaky() -> list[tuple[str, int]]:
        reader = stage.events(**{"from": "start"})
        while len(reader.events) < len(events):
            async with reader.connected() as connection:
                await connection.count(min(len(events), len(reader.events) + rng.randint(1, 60)))
        return keys(reader.events)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(log.append(*events))
        results = [group.create_task(flaky()) for _ in range(6)]
    for result in results:
        assert result.result() == keys(events)


async def test_unknown_session_waits_for_its_first_generation(stage: Stage, broker: Broker) -> None:
    reader = stage.events("new")
    async with reader.connected() as connection:
        await Log(broker, "new").append(*story("g1"))
        assert await connection.count(13)
    assert keys(reader.events) == keys(story("g1"))


async def test_repeats_and_zombie_events_are_not_sent(stage: Stage, log: Log) -> None:
    events, noisy = noisy_generation()
    first = stage.events(generation="g1")
    task = asyncio.create_task(first.read_all())
    with pytest.raises(AssertionError):  # unknown until its first event is stored
        assert await task == 200
    live = stage.events(**{"from": "start"})
    async with live.connected() as connection:
        await log.append(*noisy)
        assert await connection.count(len(events))
        replay = stage.events(generation="g1")
        await replay.read_all()
    assert keys(live.events) == keys(events) == keys(replay.events)
    assert [e.get("epoch", 1) for e in live.events] == [e.epoch for e in events]
    assert live.ids == replay.ids


async def test_resume_in_the_middle_of_repeats_and_zombies_is_exact(stage: Stage, log: Log) -> None:
    events, noisy = noisy_generation()
    stored = await log.append(*noisy)
    whole = stage.events(generation="g1")
    await whole.read_all()
    assert keys(whole.events) == keys(events)
    issuer = await stage.replica.states.issuer("default", "s")
    for position, seq in enumerate(stored):
        cursor = issuer.issue(seq)
        again = stage.events(generation="g1", after=cursor)
        status = await again.read_all()
        expected = [e for e, i in zip(events, whole.ids, strict=True) if i > cursor]
        assert keys(again.events) == keys(expected), position
        assert status == (200 if expected else 204)


def noisy_generation():  # type: ignore[no-untyped-def]
    """Return the accepted events, and a log of them with repeats, a gap, a takeover, zombies and late usage."""
    calm = story("g1", 6)[:7]
    takeover = Restarted(generation="g1", seq=7, epoch=2, reason="producer_lost")
    again = [Delta(generation="g1", seq=8 + n, epoch=2, text=f"again {n} ", tokens=n + 1) for n in range(3)]
    end = Completed(generation="g1", seq=11, epoch=2, finish_reason="stop")
    zombie = [Delta(generation="g1", seq=7 + n, text="zombie ", tokens=7 + n) for n in range(4)]
    noisy = [
        *calm[:3],
        *calm[1:3],  # repeated by a writer that got no acknowledgement
        calm[4],  # behind a lost one
        *calm[3:],
        takeover,
        *zombie[:2],
        again[0],
        zombie[2],
        again[0],
        *again[1:],
        Interrupted(generation="g1", seq=10, reason="producer_lost"),
        end,
        zombie[3],
        end,
        Delta(generation="g1", seq=12, epoch=2, text="after the end", tokens=9),
    ]
    return [*calm, takeover, *again, end], noisy


async def test_events_of_unknown_types_are_sent_in_order(stage: Stage, log: Log) -> None:
    events = story("g1", 4)
    await log.append(*events[:3])
    await log.append_bytes("g1", b'{"type":"hologram","generation":"g1","seq":3,"shape":"cube"}')
    shifted = [*events[:3], *(type(e)(**{f: getattr(e, f) for f in e.__struct_fields__}) for e in events[3:])]
    for event in shifted[3:]:
        event.seq += 1
    await log.append(*shifted[3:])
    reader = stage.events(generation="g1")
    await reader.read_all()
    assert [e["type"] for e in reader.events][3] == "hologram"
    assert [e["seq"] for e in reader.events] == list(range(len(events) + 1))


async def test_bytes_that_are_no_event_are_skipped(stage: Stage, log: Log) -> None:
    events = story("g1")
    await log.append(*events[:5])
    await log.append_bytes("g1", b"not an event \xff")
    await log.append(*events[5:])
    reader = stage.events(generation="g1")
    assert await reader.read_all() == 200
    again = stage.events(generation="g1", after=reader.ids[8])
    assert await again.read_all() == 200
    assert keys(reader.events) == keys(events)
    assert keys(again.events) == keys(events[9:])


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"generation": "nope"}, 404),
        ({"generation": "a.b"}, 400),
        ({"generation": "*"}, 400),
        ({"generation": ""}, 400),
        ({"after": "nonsense"}, 400),
        ({"after": "t1" + "0" * 30}, 400),
        ({"from": "middle"}, 400),
        ({"since": "1"}, 400),
    ],
)
async def test_invalid_read_options_are_refused(stage: Stage, log: Log, query: dict[str, str], status: int) -> None:
    await log.append(*story("g1"))
    response = await stage.http.get(f"{stage.url}/v1/sessions/s/events", params=query)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == status


async def test_cursor_of_another_session_is_refused(stage: Stage, broker: Broker, log: Log) -> None:
    await log.append(*story("g1"))
    await Log(broker, "other").append(*story("g2"))
    other = stage.events("other", generation="g2")
    await other.read_all()
    response = await stage.http.get(f"{stage.url}/v1/sessions/s/events", params={"after": other.ids[3]})
    assert response.status_code == 400
    assert response.json()["type"] == "urn:tailrace:problem:cursor-invalid"


async def test_cursor_is_410_after_its_next_events_were_removed(stage: Stage, broker: Broker, log: Log) -> None:
    stored = await log.append(*story("g1"), *story("g2"))
    whole = stage.events(**{"from": "start"})
    async with whole.connected() as connection:
        assert await connection.count(26)
    await broker.js.purge_stream("TOKENS_0", seq=stored[13])

    async def gone() -> bool:
        async with stage.events(after=whole.ids[2]).connected() as connection:
            return connection.status == 410

    await eventually(gone)
    kept = stage.events(after=whole.ids[12])
    async with kept.connected() as connection:
        assert await connection.count(13)


async def test_cursor_of_a_recreated_log_is_410(stage: Stage, broker: Broker, log: Log) -> None:
    await log.append(*story("g1"))
    whole = stage.events(generation="g1")
    await whole.read_all()
    await broker.js.delete_stream("TOKENS_0")
    await broker.apply(stage_topology())
    await log.append(*story("g2"))

    async def gone() -> bool:
        async with stage.events(after=whole.ids[3]).connected() as connection:
            return connection.status == 410

    await eventually(gone)
    fresh = stage.events(generation="g2")
    await eventually(lambda: read_whole(fresh))


def stage_topology():  # type: ignore[no-untyped-def]
    from schemas.topology import Topology

    return Topology()


async def read_whole(reader) -> bool:  # type: ignore[no-untyped-def]
    reader.events.clear()
    reader.ids.clear()
    reader.last_id = ""
    return await reader.read_all() == 200 and keys(reader.events) == keys(story("g2"))


async def test_subscribers_of_a_recreated_log_get_a_gap(stage: Stage, broker: Broker, log: Log) -> None:
    await log.append(*story("g1"))
    reader = stage.events()
    async with reader.connected() as connection:
        assert await connection.count(13)
        await broker.js.delete_stream("TOKENS_0")
        await broker.apply(stage_topology())
        async with asyncio.timeout(15):
            await connection.to_the_end()
    assert reader.controls == [("gap", {"reason": "log_recreated"})]


async def test_answer_with_an_expired_beginning_gets_a_gap_and_continues(
    stage: Stage, broker: Broker, log: Log
) -> None:
    events = story("g1", 20)
    stored = await log.append(*events[:10])
    await broker.js.purge_stream("TOKENS_0", seq=stored[5])
    await log.append(*events[10:])
    reader = stage.events(generation="g1")
    async with asyncio.timeout(5):
        await reader.read_all()
    assert keys(reader.events) == keys(events[5:])
    assert [name for name, _ in reader.controls] == ["gap"]


async def test_many_subscribers_share_one_feed_and_one_framing(stage: Stage, log: Log, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from services.delivery.formats.sse import ServerSentEvents

    framed: list[int] = []
    original = ServerSentEvents.frame

    def counting(self, entry, at):  # type: ignore[no-untyped-def]
        framed.append(entry.seq)
        return original(self, entry, at)

    monkeypatch.setattr(ServerSentEvents, "frame", counting)
    events = story("g1", 50)
    readers = [stage.events() for _ in range(50)]

    async def read(reader) -> None:  # type: ignore[no-untyped-def]
        async with reader.connected() as connection:
            assert await connection.count(len(events))

    await log.append(events[0])
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(read(reader))
        await eventually(lambda: metric("tailrace_delivery_subscribers", transport="sse") == 50)
        assert len(stage.replica.feeds._feeds) == 1
        await log.append(*events[1:])
    assert all(keys(r.events) == keys(events) for r in readers)
    assert len(framed) == len(set(framed)) == len(events)


async def test_unknown_generation_that_is_queued_waits(stage: Stage, log: Log) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    accepted = (await stage.http.post(f"{stage.url}/v1/sessions/s/generations", json=body)).json()
    generation = accepted["generation"]
    reader = stage.events(generation=generation)
    async with reader.connected() as connection:
        await log.append(*story(generation))
        await connection.to_the_end()
    assert keys(reader.events) == keys(story(generation))


async def test_cursor_of_an_accepted_request_shows_that_answer_and_nothing_earlier(stage: Stage, log: Log) -> None:
    await log.append(*story("before"))
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    url = f"{stage.url}/v1/sessions/s/generations"
    accepted = (await stage.http.post(url, json=body, headers={"Idempotency-Key": "k"})).json()
    events = [*story(accepted["generation"])]
    await log.append(*events)
    repeated = (await stage.http.post(url, json=body, headers={"Idempotency-Key": "k"})).json()
    assert repeated["generation"] == accepted["generation"]
    for cursor in (accepted["cursor"], repeated["cursor"]):
        reader = stage.events(after=cursor)
        async with asyncio.timeout(5), reader.connected() as connection:
            assert await connection.count(len(events))
        assert keys(reader.events) == keys(events)


async def test_started_is_not_a_gap(stage: Stage, log: Log) -> None:
    before = metric("tailrace_delivery_gaps_total", healed="yes")
    reader = stage.events(**{"from": "start"})
    async with reader.connected() as connection:
        await log.append(*interleaved(random.Random(3), *(story(f"g{n}", 5) for n in range(8))))
        assert await connection.count(8 * 8)
    assert metric("tailrace_delivery_gaps_total", healed="yes") == before
    assert isinstance(story("x")[0], Started)
