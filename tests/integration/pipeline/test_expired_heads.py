"""An answer whose first events have expired from the log, the oldest kept one a zombie's: every reader follows its end.

The conformance vector ``beginning-expired-later-epoch`` has the same log over every transport.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from schemas.events import AnyEvent, Completed, Delta, Interrupted, Restarted, Started, UsageReported
from schemas.requests import GenerationRecord
from schemas.usage import Counted, Usage
from services.delivery.requests.generations import Lookups
from services.kit.jetstream.broker import Broker
from services.producer.core.takeover import decide
from services.producer.relay import read_begun
from services.standalone.api import Api
from services.standalone.follow import Start, follow
from tests.conftest import NatsServer, eventually
from tests.support.billing_process import running, sqlite
from tests.support.consumer_server import Service
from tests.support.delivery_server import TENANT, Log, Stage, delivering, keys, story
from tests.support.producer_worker import ask, enqueue, producing, raw_log
from tests.support.transport_readers import READERS, Question, Servers, serving_transports

STREAM = "TOKENS_0"


def taken_over(generation: str, *, terminal: bool = True) -> list[AnyEvent]:
    """An answer that another producer began again in epoch 2, with late repeats of the first one among it."""
    written: list[AnyEvent] = [
        Started(generation=generation, seq=0, model="m", provider="p", upstream_model="u"),
        Restarted(generation=generation, seq=1, epoch=2, reason="producer_lost"),
        Delta(generation=generation, seq=2, epoch=2, text="lost ", tokens=1),
        # From here on it is kept: first what the replaced producer repeats.
        Delta(generation=generation, seq=2, text="zombie ", tokens=2),
        Delta(generation=generation, seq=3, epoch=2, text="true ", tokens=2),
        Delta(generation=generation, seq=3, text="zombie ", tokens=3),
        UsageReported(generation=generation, seq=4, epoch=2, usage=Usage(input=7, output=2)),
        Completed(generation=generation, seq=5, epoch=2, finish_reason="stop", counted=Counted(input=7, output=2)),
    ]
    return written if terminal else written[:-1]


KEPT = [("g1", 3), ("g1", 4), ("g1", 5)]


async def write(log: Log, events: list[AnyEvent], broker: Broker, kept: int = 3) -> list[int]:
    """Store events and let the first ones expire."""
    stored = await log.append(*events)
    await broker.js.purge_stream(STREAM, subject=log.subject(events[0].generation), seq=stored[kept])
    return stored


@pytest.fixture
async def stage(nats_url: str) -> AsyncIterator[Stage]:
    async with delivering(nats_url) as running_stage:
        yield running_stage


@pytest.fixture
async def log(broker: Broker, stage: Stage) -> Log:
    return Log(broker)


@pytest.fixture
async def servers(broker: Broker, nats_server: NatsServer) -> AsyncIterator[Servers]:
    async with serving_transports(nats_server.url) as both:
        yield both


@pytest.mark.parametrize("generation", ["g1", None])
async def test_every_transport_follows_the_later_epoch_to_its_end(
    servers: Servers, broker: Broker, generation: str | None
) -> None:
    await write(Log(broker), taken_over("g1"), broker)
    for name, reader in READERS.items():
        seen = await reader(servers, Question("s", "g1", generation, from_="start"))
        assert keys(event for _, event in seen.events) == KEPT, name
        assert seen.gaps == 1, name


async def test_live_subscribers_get_a_gap_for_events_that_expired_before_read_back(
    stage: Stage, broker: Broker, log: Log
) -> None:
    """The feed misses live messages, and the events to read back have expired."""
    events = story("g1", 20)
    await log.append(*events[:5])
    reader = stage.events(**{"from": "start"})
    async with reader.connected() as connection:
        await connection.count(5)
        [feed] = stage.replica.feeds._feeds.values()
        subscription = feed._subscription
        assert subscription is not None
        await stage.broker.unlisten(subscription)  # live messages are lost on the way
        stored = await log.append(*events[5:12])
        await broker.js.purge_stream(STREAM, seq=stored[4])
        feed._subscription = await stage.broker.listen("live.0.default.s.*", feed._live)
        await stage.broker.flush()
        await log.append(*events[12:])
        await connection.until(lambda client: bool(client.events) and client.events[-1]["type"] == "completed")
    assert keys(reader.events) == [*keys(events[:5]), *keys(events[9:])]
    assert reader.controls == [("gap", {"reason": "events_expired", "generation": "g1"})]


async def test_live_subscribers_get_a_gap_for_a_generation_whose_earlier_events_expired(
    stage: Stage, broker: Broker, log: Log
) -> None:
    events = story("g1", 8)
    reader = stage.events()
    async with reader.connected() as connection:
        await log.append(*story("g0", 1))
        await connection.count(4)
        await log.append(*events[5:])
        await connection.count(4 + len(events[5:]))
    assert keys(reader.events)[4:] == keys(events[5:])
    assert reader.controls == [("gap", {"reason": "beginning_expired", "generation": "g1"})]


async def view(stage: Stage, generation: str = "g1") -> dict[str, Any]:
    response = await stage.http.get(f"{stage.url}/v1/sessions/s/generations/{generation}")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


async def test_the_lookup_returns_the_final_state_and_the_kept_text(stage: Stage, broker: Broker, log: Log) -> None:
    await write(log, taken_over("g1"), broker)
    found = await view(stage)
    assert (found["state"], found["text"], found["finish_reason"]) == ("completed", "true ", "stop")
    assert (found["beginning_expired"], found["events"], found["usage"]["output"]) == (True, 3, 2)
    assert found["counted"] == {"input": 7, "output": 2}
    waited = await stage.http.get(f"{stage.url}/v1/sessions/s/generations/g1", params={"wait": "complete"})
    assert (waited.status_code, waited.json()["state"]) == (200, "completed")


async def record(stage: Stage, **fields: Any) -> None:
    lookups = Lookups(stage.broker, stage.replica.clock, stage.replica.states.partition)
    known = {"tenant": TENANT, "session": "s", "generation": "g1", "model": "m", "created_at": 1.0}
    assert await lookups.create(GenerationRecord(**(known | fields)))


async def test_the_lookup_of_an_expired_answer_uses_its_record(stage: Stage, broker: Broker, log: Log) -> None:
    await record(
        stage, state="completed", started_at=2.0, ended_at=3.0, finish_reason="stop", counted=Counted(output=9)
    )
    stored = await log.append(*story("g1", 3))
    await broker.js.purge_stream(STREAM, seq=stored[-1] + 1)
    found = await view(stage)
    assert (found["state"], found["started_at"], found["ended_at"], found["finish_reason"]) == (
        *("completed", 2.0, 3.0, "stop"),
    )
    assert found["counted"]["output"] == 9


async def test_a_stream_of_an_expired_answer_ends_at_once(stage: Stage, broker: Broker, log: Log) -> None:
    await record(stage, state="completed", ended_at=3.0)
    stored = await log.append(*story("g1", 3))
    await log.append(*story("g2", 3))
    await broker.js.purge_stream(STREAM, seq=stored[-1] + 1)
    url = f"{stage.url}/v1/sessions/s/events"
    refused = await stage.http.get(url, params={"generation": "g1"})
    assert (refused.status_code, refused.json()["type"].rpartition(":")[2]) == (410, "cursor-expired")
    assert (await stage.http.get(url, params={"generation": "g1", "from": "live"})).status_code == 204
    waited = await stage.http.get(f"{stage.url}/v1/sessions/s/generations/g1", params={"wait": "complete"})
    assert (waited.status_code, waited.json()["state"]) == (200, "completed")


async def test_a_complete_log_overrides_the_record(stage: Stage, log: Log) -> None:
    await record(stage, state="completed", ended_at=3.0)
    await log.append(*story("g1", 3)[:-1])
    assert (await view(stage))["state"] == "running"


async def test_a_durable_consumer_receives_the_later_epoch_with_a_gap(stage: Stage, broker: Broker, log: Log) -> None:
    await write(log, taken_over("g1"), broker)
    events = await (await Service(stage).created()).batch()
    assert keys(e["event"] for e in events) == KEPT
    assert [e.get("gap") for e in events] == ["beginning_expired", None, None]


async def test_the_command_line_follows_the_later_epoch_to_its_end(stage: Stage, broker: Broker, log: Log) -> None:
    await write(log, taken_over("g1"), broker)
    remarks: list[str] = []

    def read() -> list[AnyEvent | None]:
        with Api(stage.url) as api:
            return [one.event for one in follow(api, Start("s", "g1", from_="start"), remarks.append)]

    assert keys(await asyncio.to_thread(read)) == KEPT
    assert len(remarks) == 1
    assert "beginning_expired" in remarks[0]


async def test_billing_counts_and_settles_the_later_epoch(
    stage: Stage, broker: Broker, log: Log, tmp_path: Path
) -> None:
    await write(log, taken_over("g1"), broker)
    async with running(broker, sqlite(tmp_path), batch=1) as run:

        async def settled() -> bool:
            g = await run.reports.generation(TENANT, "g1")
            return g is not None and (g.state, g.epoch, g.next_seq, g.headless) == ("completed", 2, 6, True)

        await eventually(settled)
        g = await run.reports.generation(TENANT, "g1")
        assert g is not None
        assert (g.status, g.counted_output, g.output) == ("matched", 2, 2)


async def test_a_takeover_finds_the_terminal_of_the_later_epoch(stage: Stage, broker: Broker, log: Log) -> None:
    stored = await write(log, taken_over("g1"), broker)
    begun = await read_begun(broker, STREAM, log.subject("g1"))
    assert (begun.position, begun.last_seq) == ((2, 6, True), stored[-1])
    assert decide(begun, may_restart=True) == "done"


async def test_a_producer_interrupts_a_generation_that_a_later_epoch_left_open(broker: Broker) -> None:
    """A redelivered request: its log has lost the head, and begins with a zombie."""
    request = ask("g1")
    log = Log(broker, request.session)
    async with producing(broker):
        await write(log, taken_over("g1", terminal=False), broker)
        await enqueue(broker, request)

        async def closed() -> bool:
            return isinstance((await raw_log(broker, request))[-1], Interrupted)

        await eventually(closed)
        last = (await raw_log(broker, request))[-1]
    assert isinstance(last, Interrupted)
    assert (last.seq, last.epoch, last.counted.output) == (5, 3, 2)
