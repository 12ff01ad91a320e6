"""Test a broker that is frozen for longer than the lease: the producer and its answer continue."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from prometheus_client import REGISTRY

from schemas.events import type_of
from schemas.holders import HELD, holder_question
from schemas.requests import Request
from schemas.subjects import Address, holder_subject
from schemas.topology import REQUESTS, Topology
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.producer.adapters.claims import Claims
from tests.conftest import NatsServer, eventually
from tests.support.openai_answers import assert_sound, chunk, config, deltas, ending
from tests.support.producer_worker import ask, ended_log, enqueue, producing, text_of
from tests.support.provider_server import Provider, Replay, providing

LEASE = 4.0
SILENCE = 2.5 * LEASE


class Answer:
    """An answer whose first word is sent at once, and the rest when it is released."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self._go_on = asyncio.Event()
        provider.replay = Replay([chunk("one "), chunk("two "), chunk("three") + ending()], gate=self._go_on.wait)

    async def finish(self) -> None:
        """Let all the rest come, and wait until the producer has it."""
        self._go_on.set()
        await eventually(lambda: self.provider.active == 0)


@asynccontextmanager
async def broker_at(server: NatsServer) -> AsyncIterator[Broker]:
    async with Broker.connect(server.url, "test") as broker:
        await broker.apply(Topology(ack_wait=LEASE))
        yield broker


@asynccontextmanager
async def frozen(server: NatsServer) -> AsyncIterator[None]:
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


async def queue_is_empty(broker: Broker) -> bool:
    with suppress(BrokerUnavailable):  # it may only just be coming back
        state = await broker.state(REQUESTS)
        return state.last_seq < state.first_seq
    return False


def count(metric: str) -> float:
    return REGISTRY.get_sample_value(metric) or 0.0


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("loss", ["restart", "interrupt"])
async def test_an_answer_received_during_broker_silence_is_completed_by_its_producer(
    own_nats: NatsServer, loss: str, others: int
) -> None:
    request = ask("g1", "m", on_producer_loss=loss)
    async with providing() as provider, broker_at(own_nats) as broker, AsyncExitStack() as stack:
        answer = Answer(provider)
        await stack.enter_async_context(producing(broker, config=config(provider.url), lease=LEASE))
        await enqueue(broker, request)
        await deltas(broker, request)
        for _ in range(others):
            other = await stack.enter_async_context(broker_at(own_nats))
            await stack.enter_async_context(producing(other, config=config(provider.url), lease=LEASE))
        async with frozen(own_nats):
            await asyncio.sleep(SILENCE)  # the fault itself
            await answer.finish()
        await eventually(lambda: queue_is_empty(broker), timeout=60)
        events = await ended_log(broker, request)
        assert len(provider.asked) == 1
        assert await assert_sound(broker, request) == events
    ends = [kind for kind in map(type_of, events) if kind not in ("notice", "delta")]
    assert ends == ["started", "usage", "completed"]
    assert text_of(events) == "one two three"
    assert len({event.epoch for event in events}) == 1


async def test_a_paused_producer_resumes_its_lease_when_no_other_began_the_request(own_nats: NatsServer) -> None:
    request = ask("g1", "m", on_producer_loss="restart")
    resumed = count("tailrace_producer_leases_resumed_total")
    async with providing() as provider, broker_at(own_nats) as broker:
        answer = Answer(provider)
        async with producing(broker, config=config(provider.url), lease=LEASE) as worker:
            await enqueue(broker, request)
            await deltas(broker, request)
            (held,) = worker.leases.held()
            held.lease.until = asyncio.get_running_loop().time() - 0.1
            await answer.finish()
            events = await ended_log(broker, request)
            await eventually(lambda: queue_is_empty(broker))
        assert len(provider.asked) == 1
    assert type_of(events[-1]) == "completed"
    assert count("tailrace_producer_leases_resumed_total") == resumed + 1


async def test_a_lapsed_lease_is_lost_when_another_producer_has_begun_the_request(own_nats: NatsServer) -> None:
    request = ask("g1", "m", on_producer_loss="restart")
    async with providing() as provider, broker_at(own_nats) as broker:
        answer = Answer(provider)
        async with producing(broker, config=config(provider.url), lease=LEASE) as worker:
            await enqueue(broker, request)
            await deltas(broker, request)
            (held,) = worker.leases.held()
            held.lease.until = asyncio.get_running_loop().time() - 0.1
            address, claims = address_of(request), Claims(broker)
            await claims.claim(address, 2, await claims.last(address, 2))
            await eventually(lambda: held.lease.is_lost)
            await eventually(lambda: not worker.running)
        await answer.finish()


async def test_only_the_producer_of_the_latest_epoch_confirms_that_it_holds_a_request(own_nats: NatsServer) -> None:
    request = ask("g1", "m")
    async with providing() as provider, broker_at(own_nats) as broker:
        answer = Answer(provider)
        async with producing(broker, config=config(provider.url), lease=LEASE) as worker:
            subject = holder_subject("default", "s", "g1")
            assert await broker.request(subject, holder_question(0)) is None, "nobody listens yet"
            await enqueue(broker, request)
            await deltas(broker, request)
            assert await broker.request(subject, holder_question(0)) == HELD
            with pytest.raises(BrokerUnavailable):
                await broker.request(subject, holder_question(7), timeout=0.5)
            await answer.finish()
            await ended_log(broker, request)
            await eventually(lambda: not worker.running)


def address_of(request: Request) -> Address:
    return Address.of(request.tenant, request.session, request.generation, 1)


async def test_a_request_returned_by_a_drain_is_redelivered_at_once_after_a_broker_restart(
    own_nats: NatsServer,
) -> None:
    """With its lease of a minute a plain refusal would be given again after that: the queue does not write it down."""
    request = ask("g1", "scripted/stall", params={"tokens": 20, "stall_after": 2, "tokens_per_second": 1_000})
    async with Broker.connect(own_nats.url, "test") as broker:
        await broker.apply(Topology(ack_wait=60.0))
        async with producing(broker, drain=0.0, lease=60.0):
            await enqueue(broker, request)
            await deltas(broker, request)
    own_nats.stop()
    own_nats.start()
    async with Broker.connect(own_nats.url, "test") as broker, producing(broker, lease=60.0):
        events = await ended_log(broker, request, timeout=20)
        await eventually(lambda: queue_is_empty(broker))
    assert type_of(events[-1]) == "interrupted"


async def test_a_request_in_transit_to_a_stopping_producer_is_redelivered_at_once(
    own_nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue has answered a pull of a producer that has just closed it."""
    request = ask("g1", params={"tokens": 3, "tokens_per_second": 200})
    async with Broker.connect(own_nats.url, "test") as broker, Broker.connect(own_nats.url, "test") as far:
        await broker.apply(Topology(ack_wait=600.0))
        async with producing(far, lease=600.0) as worker:
            await eventually(lambda: worker._lanes[0]._pulling is not None)
            await pulls_have_arrived(broker)
            late = asyncio.Event()
            hold_arrivals(far, late, monkeypatch)
            await enqueue(broker, request)
            await eventually(lambda: given(broker))
            asyncio.get_running_loop().call_later(0.1, late.set)
        async with producing(broker, lease=600.0):
            assert type_of((await ended_log(broker, request))[-1]) == "completed"


async def given(broker: Broker) -> bool:
    info = await broker.js.consumer_info(REQUESTS, "producers-default")
    return info.num_ack_pending == 1


async def pulls_have_arrived(broker: Broker) -> None:
    async def waiting() -> bool:
        return bool((await broker.js.consumer_info(REQUESTS, "producers-default")).num_waiting)

    await eventually(waiting)


def hold_arrivals(broker: Broker, until: asyncio.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the connection hand on nothing that arrives until then."""
    process = broker.client._process_msg

    async def held(*message: object) -> None:
        await until.wait()
        await process(*message)  # type: ignore[arg-type]

    monkeypatch.setattr(broker.client, "_process_msg", held)
