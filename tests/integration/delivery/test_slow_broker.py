"""Test that a slow broker does not get more requests."""

import asyncio

import pytest

from services.delivery.app import Replica
from services.delivery.settings import Settings
from services.kit.clock import SystemClock
from services.kit.jetstream.broker import Broker, BrokerUnavailable, StreamState
from services.kit.settings import Shared
from tests.conftest import eventually


class Slow:
    """Delays a replica's requests for stream states until the test releases them."""

    def __init__(self, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.answers = asyncio.Event()
        self.lost = False
        self._state = broker.state
        monkeypatch.setattr(broker, "state", self.state)

    async def state(self, stream: str) -> StreamState:
        self.asked += 1
        if self.lost:
            raise BrokerUnavailable("no answer")
        await self.answers.wait()
        return await self._state(stream)


@pytest.fixture
def replica(broker: Broker) -> Replica:
    return Replica(broker, SystemClock(), Shared(), Settings())


async def test_concurrent_requests_for_the_bounds_of_a_log_are_shared(
    replica: Replica, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(broker, monkeypatch)
    waiting = [asyncio.create_task(replica.states.state(0)) for _ in range(20)]
    await eventually(lambda: slow.asked > 0)
    slow.answers.set()
    assert len(set(await asyncio.gather(*waiting))) == 1
    assert slow.asked == 1


async def test_a_failed_state_request_is_repeated_by_the_next_caller(
    replica: Replica, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(broker, monkeypatch)
    slow.lost = True
    answers = await asyncio.gather(*(replica.states.state(0) for _ in range(5)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [BrokerUnavailable] * 5
    slow.lost = False
    slow.answers.set()
    assert (await replica.states.state(0)).last_seq == 0
    assert slow.asked == 2


async def test_a_running_periodic_task_is_not_started_again(replica: Replica) -> None:
    begun, ends = [], asyncio.Event()

    async def look() -> None:
        begun.append(1)
        await ends.wait()

    replica.supervisor.every_second("starts", look)
    for _ in range(5):
        replica.supervisor.poll(0.0)
        await asyncio.sleep(0)
    assert len(begun) == 1
    ends.set()
    await eventually(lambda: "starts" not in replica.supervisor._running)
    replica.supervisor.poll(0.0)
    await eventually(lambda: len(begun) == 2)
