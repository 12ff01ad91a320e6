"""Circuit breakers of one process, and of several that share a broker."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import REGISTRY

from services.kit.broker import Broker
from services.producer.adapters.circuits import COUNTED, Circuits
from services.producer.core.parts import UpstreamFailure
from tests.conftest import eventually

DOWN = UpstreamFailure("upstream_unreachable", "nobody there", recoverable=True)
FOR_EVER = 1_000.0


def shown(provider: str) -> float | None:
    return REGISTRY.get_sample_value("tailrace_producer_circuit_state", {"provider": provider})


def opened(circuits: Circuits, provider: str = "p", failures: int = 3) -> None:
    for _ in range(failures):
        assert circuits.admits(provider)
        circuits.failed(provider, DOWN)


@asynccontextmanager
async def following(circuits: Circuits) -> AsyncIterator[Circuits]:
    task = asyncio.create_task(circuits.follow())
    try:
        yield circuits
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_it_opens_after_so_many_failures_in_a_row(broker: Broker) -> None:
    circuits = Circuits(broker, 3, FOR_EVER)
    opened(circuits, failures=2)
    circuits.succeeded("p")
    opened(circuits, failures=2)
    assert circuits.admits("p")
    circuits.failed("p", DOWN)
    assert not circuits.admits("p")
    assert shown("p") == 2


async def test_one_upstream_says_nothing_of_another(broker: Broker) -> None:
    circuits = Circuits(broker, 3, FOR_EVER)
    opened(circuits, "p")
    assert not circuits.admits("p")
    assert circuits.admits("q")


@pytest.mark.parametrize("code", ["upstream_rate_limited", "upstream_unauthorized", "upstream_bad_request"])
async def test_refusals_of_a_request_do_not_open_it(broker: Broker, code: str) -> None:
    circuits = Circuits(broker, 1, FOR_EVER)
    assert code not in COUNTED
    circuits.failed("p", UpstreamFailure(code, "no"))
    assert circuits.admits("p")


async def test_half_open_lets_one_call_through_and_closes_on_its_success(broker: Broker) -> None:
    circuits = Circuits(broker, 3, 0.05)
    opened(circuits)
    await eventually(lambda: circuits.admits("p"))
    assert shown("p") == 1
    assert not circuits.admits("p")
    circuits.succeeded("p")
    assert circuits.admits("p")
    assert circuits.admits("p")
    assert shown("p") == 0


async def test_half_open_opens_again_on_the_first_failure(broker: Broker) -> None:
    circuits = Circuits(broker, 3, 0.05)
    opened(circuits)
    await eventually(lambda: circuits.admits("p"))
    circuits.failed("p", DOWN)
    assert not circuits.admits("p")
    assert shown("p") == 2
    await eventually(lambda: circuits.admits("p"))


async def test_a_trial_that_is_abandoned_leaves_room_for_another(broker: Broker) -> None:
    circuits = Circuits(broker, 3, 0.05)
    opened(circuits)
    await eventually(lambda: circuits.admits("p"))
    circuits.abandoned("p")
    assert circuits.admits("p")


async def test_an_open_circuit_can_be_seen_without_asking_for_admission(broker: Broker) -> None:
    circuits = Circuits(broker, 3, 0.05)
    assert not circuits.is_open("p")
    opened(circuits)
    assert circuits.is_open("p")
    await eventually(lambda: not circuits.is_open("p"))
    assert circuits.admits("p"), "looking took no trial away"


@pytest.mark.parametrize("provider", ["p", "my.own_provider-2"])
async def test_what_one_producer_finds_out_all_know(broker: Broker, provider: str) -> None:
    one, other = Circuits(broker, 3, FOR_EVER), Circuits(broker, 3, FOR_EVER)
    async with following(other):
        opened(one, provider)
        await eventually(lambda: other.is_open(provider))
        assert not other.admits(provider)


async def test_who_comes_later_learns_what_is_known(broker: Broker) -> None:
    one, other = Circuits(broker, 3, FOR_EVER), Circuits(broker, 3, FOR_EVER)
    opened(one)
    async with following(other):
        await eventually(lambda: other.is_open("p"))


async def test_a_recovery_is_shared_as_well(broker: Broker) -> None:
    one, other = Circuits(broker, 3, 0.3), Circuits(broker, 3, FOR_EVER)
    async with following(other):
        opened(one)
        await eventually(lambda: other.is_open("p"))
        await eventually(lambda: one.admits("p"))
        one.succeeded("p")
        await eventually(lambda: other.admits("p"))
        assert other.admits("p")
