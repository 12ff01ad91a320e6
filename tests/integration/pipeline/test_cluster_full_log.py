"""Test a full log: running answers lose no event, requests are refused, and all services recover with space."""

import msgspec
import pytest

from schemas.events import Completed, Delta, is_terminal, type_of
from schemas.requests import Request
from schemas.topology import DEAD, REQUESTS, Topology, token_stream
from services.kit.jetstream.broker import Broker
from services.kit.jetstream.errors import APIError
from services.kit.settings import Shared
from tests.conftest import NatsServer, eventually
from tests.support.delivery_server import delivering, metric
from tests.support.producer_worker import accepted_log, ask, ended_log, enqueue, producing, raw_log

LOG = token_stream(0)
BOUND = 60_000


async def filled(broker: Broker) -> None:
    """Fill the log up to the last bytes with another session's events."""
    for size in (8_000, 200, 1):
        with pytest.raises(APIError, match="maximum bytes exceeded"):
            await _publish_for_ever(broker, b"x" * size)


async def _publish_for_ever(broker: Broker, data: bytes) -> None:
    while True:
        await broker.publish_stored("tokens.0.default.filler.g", data)


async def waiting(broker: Broker) -> int:
    return (await broker.js.stream_info(REQUESTS)).state.messages


async def test_a_full_log_refuses_new_events_and_keeps_the_old_ones(own_nats: NatsServer) -> None:
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology(max_bytes=BOUND))
        await filled(broker)
        state = await broker.state(LOG)
        assert state.first_seq == 1
        assert state.used > 0.99


async def test_an_answer_on_a_full_log_gets_its_terminal_when_space_is_available(own_nats: NatsServer) -> None:
    request = ask("g", params={"tokens": 4_000, "tokens_per_second": 4_000})
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology(max_bytes=BOUND))
        async with producing(broker, append_timeout=2.0):
            await enqueue(broker, request)
            await eventually(lambda: _used(broker, 0.95), timeout=20)
            begun = await accepted_log(broker, request)
            assert begun
            assert not any(is_terminal(event) for event in begun)
            await eventually(lambda: metric("tailrace_producer_log_refusals_total") > 0)
            # Space comes back: what has expired elsewhere goes, and the bound is wider than before.
            await broker.apply(Topology(max_bytes=20 * BOUND))
            events = await ended_log(broker, request, timeout=30)
            await eventually(lambda: _nothing_waits(broker))
        assert [type_of(event) for event in events if is_terminal(event)] in (["interrupted"], ["completed"])
        assert [event.seq for event in events] == list(range(len(events)))
        assert events[: len(begun)] == begun
        assert (await broker.js.stream_info(DEAD)).state.messages == 0


async def test_a_request_accepted_while_the_log_is_full_runs_when_space_is_available(own_nats: NatsServer) -> None:
    request = ask("g")
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology(max_bytes=BOUND))
        await filled(broker)
        async with producing(broker, append_timeout=1.0) as worker:
            await enqueue(broker, request)
            await eventually(lambda: worker.running)
            await eventually(lambda: not worker.running, timeout=20)  # handed back
            assert await waiting(broker) == 1
            assert await raw_log(broker, request) == []
            await broker.js.purge_stream(LOG)
            events = await ended_log(broker, request, timeout=30)
            await eventually(lambda: _nothing_waits(broker))
        assert isinstance(events[-1], Completed)
        assert any(isinstance(event, Delta) for event in events)


async def test_delivery_refuses_requests_while_the_log_is_full_and_takes_them_again(own_nats: NatsServer) -> None:
    shared = Shared(nats_url=own_nats.url, log_max_bytes=BOUND)
    body = {"model": "scripted/story", "messages": [{"role": "user", "content": "rivers"}]}
    async with delivering(own_nats.url, shared=shared) as stage:
        await filled(stage.broker)

        async def status() -> int:
            answer = await stage.http.post(f"{stage.url}/v1/sessions/s/generations", json=body)
            if answer.status_code == 503:
                assert answer.json()["type"] == "urn:tailrace:problem:log-full"
                assert int(answer.headers["Retry-After"]) > 0
            return answer.status_code

        before = metric("tailrace_delivery_log_full_total")
        await eventually(lambda: _is(status, 503))
        assert metric("tailrace_delivery_log_full_total") > before
        assert metric("tailrace_delivery_log_used_ratio", partition="0") > 0.95
        assert await waiting(stage.broker) == 0
        assert (await stage.http.get(f"{stage.url}/v1/sessions/s")).status_code == 404  # nothing was left half done
        await stage.broker.js.purge_stream(LOG)
        await eventually(lambda: _is(status, 202))
        raw = await stage.broker.js.get_last_msg(REQUESTS, "requests.>")
        assert msgspec.json.decode(raw.data or b"", type=Request).partition == 0


async def _used(broker: Broker, share: float) -> bool:
    return (await broker.state(LOG)).used > share


async def _nothing_waits(broker: Broker) -> bool:
    return await waiting(broker) == 0


async def _is(status, wanted: int) -> bool:  # type: ignore[no-untyped-def]
    return await status() == wanted
