"""Limits of an upstream: concurrent streams, rate, and the order in which waiting calls are admitted."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import REGISTRY

from schemas.requests import Priority
from services.producer import upstream_limits as module
from services.producer.upstream_limits import UpstreamLimiter, UpstreamLimits
from tests.conftest import eventually

_NAMES = itertools.count()


class Passing:
    """Holds a slot in a task of its own until `leave`."""

    def __init__(
        self, limiter: UpstreamLimiter, name: str, entered: list[str], priority: Priority, since: float
    ) -> None:
        self.name = name
        self.inside = False
        self._limiter = limiter
        self._entered = entered
        self._leave = asyncio.Event()
        self.task = asyncio.create_task(self._run(priority, since))

    async def _run(self, priority: Priority, since: float) -> None:
        async with self._limiter.slot(priority, since):
            self._entered.append(self.name)
            self.inside = True
            try:
                await self._leave.wait()
            finally:
                self.inside = False

    async def leave(self) -> None:
        self._leave.set()
        await self.task

    async def cancel(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class Crowd:
    """The calls at one limiter, and the order in which they were admitted."""

    def __init__(self, limiter: UpstreamLimiter) -> None:
        self.limiter = limiter
        self.entered: list[str] = []
        self.all: list[Passing] = []

    async def come(self, name: str, priority: Priority = "interactive", since: float = 0.0) -> Passing:
        one = Passing(self.limiter, name, self.entered, priority, since)
        self.all.append(one)
        await settled()
        return one


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def crowd(max_streams: int | None, per_minute: int | None = None) -> AsyncIterator[Crowd]:
    name = f"limited-{next(_NAMES)}"
    made = Crowd(UpstreamLimiter(name, max_streams, per_minute))
    made.provider = name  # type: ignore[attr-defined]  # for the gauge alone
    try:
        yield made
    finally:
        for one in made.all:
            await one.cancel()
        assert made.limiter._running == 0
        assert waiting(made) == 0


def waiting(who: Crowd) -> float:
    name: str = who.provider  # type: ignore[attr-defined]  # set above
    return REGISTRY.get_sample_value("tailrace_producer_gate_waiting", {"provider": name}) or 0.0


async def test_no_more_calls_than_the_limit_run() -> None:
    async with crowd(2) as who:
        first, _second, _third = await who.come("a"), await who.come("b"), await who.come("c")
        assert who.entered == ["a", "b"]
        await first.leave()
        await settled()
        assert who.entered == ["a", "b", "c"]


async def test_without_limits_all_calls_are_admitted() -> None:
    async with crowd(None) as who:
        for number in range(100):
            await who.come(str(number))
        assert len(who.entered) == 100


async def test_waiting_calls_are_admitted_by_priority_then_age_then_arrival() -> None:
    async with crowd(1) as who:
        first = await who.come("first")
        await who.come("batch old", "batch", 1.0)
        await who.come("young", "interactive", 9.0)
        await who.come("old", "interactive", 5.0)
        await who.come("old too", "interactive", 5.0)
        await who.come("batch young", "batch", 2.0)
        await first.leave()
        for _ in range(4):
            await settled()
            await next(one for one in who.all if one.inside).leave()
        await settled()
        assert who.entered == ["first", "old", "old too", "young", "batch old", "batch young"]


async def test_the_gauge_counts_waiting_calls() -> None:
    async with crowd(1) as who:
        first = await who.come("a")
        other = await who.come("b")
        third = await who.come("c")
        assert waiting(who) == 2
        await third.cancel()
        assert waiting(who) == 1
        await first.leave()
        await settled()
        assert waiting(who) == 0
        assert other.inside


async def test_a_cancelled_waiting_call_leaves_no_trace() -> None:
    async with crowd(1) as who:
        await who.come("a")
        for number in range(100):
            gone = await who.come(f"gone {number}", "batch", float(number))
            await gone.cancel()
        assert len(who.limiter._waiting) == 0


async def test_a_call_admitted_and_cancelled_at_once_frees_its_slot_once() -> None:
    async with crowd(1) as who:
        first = await who.come("a")
        second = await who.come("b")
        third = await who.come("c")
        fourth = await who.come("d")
        first._leave.set()
        await asyncio.sleep(0)  # the first leaves and the second's place is given
        second.task.cancel()
        await settled()
        assert [one.inside for one in (second, third, fourth)].count(True) == 1
        assert who.limiter._running == 1


async def test_calls_per_minute_are_bounded_and_refilled_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MINUTE", 0.5)
    async with crowd(None, per_minute=3) as who:
        for name in ("a", "b", "c", "late", "later"):
            one = await who.come(name, since=float(len(who.all)))
            if one.inside:
                await one.leave()
        assert who.entered[:3] == ["a", "b", "c"]
        await eventually(lambda: who.entered == ["a", "b", "c", "late", "later"])


async def test_calls_waiting_for_the_rate_are_admitted_by_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MINUTE", 0.5)
    async with crowd(None, per_minute=1) as who:
        await who.come("a")
        await who.come("batch", "batch", 1.0)
        await who.come("interactive", "interactive", 2.0)
        await eventually(lambda: len(who.entered) == 3)
        assert who.entered == ["a", "interactive", "batch"]


@pytest.mark.parametrize("seed", range(30))
async def test_slots_are_never_exceeded_nor_lost_under_random_arrivals_and_cancellations(seed: int) -> None:
    rng = random.Random(seed)
    places = rng.randint(1, 4)
    async with crowd(places) as who:
        for step in range(200):
            match rng.random():
                case x if x < 0.5:
                    priority: Priority = rng.choice(["interactive", "batch"])
                    who.all.append(Passing(who.limiter, str(step), who.entered, priority, rng.random()))
                case x if x < 0.75 and who.all:
                    rng.choice(who.all)._leave.set()
                case _ if who.all:
                    rng.choice(who.all).task.cancel()
            for _ in range(rng.randint(0, 3)):
                await asyncio.sleep(0)
            assert sum(one.inside for one in who.all) <= places
        await settled()
        waits = sum(not one.task.done() and not one.inside for one in who.all)
        assert waits == 0 or sum(one.inside for one in who.all) == places
        assert waiting(who) == waits


def test_a_provider_has_one_limiter() -> None:
    limits = UpstreamLimits()
    assert limits.of("p", 1, None) is limits.of("p", 1, None)
    assert limits.of("p", 1, None) is not limits.of("q", 1, None)
