"""Test the object through which every cause stops a generation."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from services.producer.interruption import Interruption, Stopped, StopReason


class Run:
    """A task that is covered by an interruption and reports how it ended."""

    def __init__(self, interruption: Interruption, work: Callable[[], Awaitable[object]]) -> None:
        self.reasons: list[StopReason] = []
        self._interruption = interruption
        self._work = work
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> int:
        with self._interruption.covering():
            try:
                await self._work()
            except asyncio.CancelledError:
                self.reasons.append(self._interruption.take())
        task = asyncio.current_task()
        assert task is not None
        await asyncio.sleep(0)  # nothing of the cancellation is left
        return task.cancelling()


async def started(interruption: Interruption, work: Callable[[], Awaitable[object]] | None = None) -> Run:
    run = Run(interruption, work or asyncio.Event().wait)
    await asyncio.sleep(0)
    return run


async def test_an_interruption_cancels_the_covered_task_and_takes_the_cancellation_back() -> None:
    interruption = Interruption()
    run = await started(interruption)
    interruption.interrupt("cancelled", "requested")
    assert await run.task == 0
    assert run.reasons == [interruption.reason] == [StopReason("cancelled", "requested")]


async def test_the_first_reason_wins_and_cancels_once() -> None:
    interruption = Interruption()
    run = await started(interruption)
    for kind in ("over_budget", "cancelled", "drain"):
        interruption.interrupt(kind, kind)  # type: ignore[arg-type]  # kinds, all three
    assert await run.task == 0
    assert [reason.kind for reason in run.reasons] == ["over_budget"]
    assert interruption.reason == run.reasons[0]


async def test_a_later_reason_replaces_the_deadline_of_one_call() -> None:
    interruption = Interruption()
    run = await started(interruption)
    interruption.interrupt("attempt", "deadline_connect")
    interruption.interrupt("cancelled", "requested")
    await run.task
    assert [reason.kind for reason in run.reasons] == ["cancelled"]


@pytest.mark.parametrize("kind", ["attempt", "overdue"])
async def test_a_deadline_applies_only_to_its_own_calls(kind: str) -> None:
    interruption = Interruption()
    run = await started(interruption)
    interruption.interrupt(kind, "deadline_total")  # type: ignore[arg-type]  # a kind
    await run.task
    assert interruption.reason is None
    with interruption.covering():
        pass


async def test_an_interrupted_generation_makes_no_further_calls() -> None:
    interruption = Interruption()
    interruption.interrupt("cancelled", "requested")
    with pytest.raises(Stopped) as stopped, interruption.covering():
        raise AssertionError("not reached")
    assert stopped.value.reason == StopReason("cancelled", "requested")


async def test_a_generation_can_resume_after_a_log_loss() -> None:
    interruption = Interruption()
    interruption.interrupt("lost", "log_lost")
    interruption.resume()
    with interruption.covering():
        pass


async def test_an_external_cancellation_is_propagated() -> None:
    interruption = Interruption()
    run = await started(interruption)
    run.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run.task
    assert run.reasons == []


async def postponed(interruption: Interruption, work: Callable[[], Awaitable[object]], seconds: float) -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        assert interruption.allows_usage

        async def grace() -> None:
            await work()

        await interruption.postpone(grace(), seconds)
        raise


async def test_a_cancelled_call_may_be_read_on_before_the_cancellation_takes_effect() -> None:
    interruption, usage = Interruption(), asyncio.Event()
    run = await started(interruption, lambda: postponed(interruption, usage.wait, 60.0))
    interruption.interrupt("cancelled", "requested")
    await asyncio.sleep(0.01)
    assert not run.task.done()
    usage.set()
    assert await run.task == 0
    assert [reason.kind for reason in run.reasons] == ["cancelled"]


async def test_a_postponed_read_ends_at_its_time_limit() -> None:
    interruption = Interruption()
    run = await started(interruption, lambda: postponed(interruption, asyncio.Event().wait, 0.01))
    interruption.interrupt("over_budget", "budget_exceeded")
    assert await asyncio.wait_for(run.task, 5.0) == 0
    assert [reason.kind for reason in run.reasons] == ["over_budget"]


@pytest.mark.parametrize("kind", ["drain", "lease", "lost"])
async def test_a_later_interruption_ends_the_postponed_read_and_keeps_the_first_reason(kind: str) -> None:
    interruption = Interruption()
    run = await started(interruption, lambda: postponed(interruption, asyncio.Event().wait, 60.0))
    interruption.interrupt("cancelled", "requested")
    await asyncio.sleep(0)
    interruption.interrupt(kind, kind)  # type: ignore[arg-type]  # a kind
    assert await asyncio.wait_for(run.task, 5.0) == 0
    assert [reason.kind for reason in run.reasons] == ["cancelled"]


@pytest.mark.parametrize(("kind", "ends"), [("drain", True), ("lease", True), ("lost", False), ("cancelled", False)])
async def test_a_read_of_the_log_ends_early_only_where_the_request_is_handed_over(kind: str, ends: bool) -> None:
    interruption, stored = Interruption(), asyncio.Event()
    reading = asyncio.create_task(interruption.reading(stored.wait()))
    await asyncio.sleep(0)
    interruption.interrupt(kind, kind)  # type: ignore[arg-type]  # a kind
    await asyncio.sleep(0.01)
    stored.set()
    if ends:
        with pytest.raises(TimeoutError):
            await reading
    else:
        assert await reading is True
