"""Background tasks, calls that are shared by key, and waits with a time limit."""

import asyncio

import pytest
import structlog.testing

from services.kit.tasks import BackgroundTasks, SingleFlight, first_of, together, wait_for_event


async def test_background_tasks_are_counted_until_they_end() -> None:
    tasks, go_on = BackgroundTasks(), asyncio.Event()
    tasks.start(go_on.wait(), name="one")
    assert (len(tasks), [task.get_name() for task in tasks]) == (1, ["one"])
    go_on.set()
    await tasks.wait()
    await asyncio.sleep(0)
    assert len(tasks) == 0


async def test_waiting_for_background_tasks_is_bounded() -> None:
    tasks = BackgroundTasks()
    task = tasks.start(asyncio.Event().wait(), name="endless")
    await tasks.wait(0.01)
    assert not task.done()
    await tasks.close()
    assert task.cancelled()


async def test_a_failed_background_task_is_logged_with_its_name() -> None:
    async def fail() -> None:
        raise ValueError("no luck")

    tasks = BackgroundTasks()
    with structlog.testing.capture_logs() as logs:
        tasks.start(fail(), name="unlucky")
        await tasks.wait()
        await asyncio.sleep(0)
    assert [(entry["event"], entry["task"]) for entry in logs] == [("background task failed", "unlucky")]


async def test_callers_with_one_key_share_one_call() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    started: list[str] = []
    go_on = asyncio.Event()

    async def call(key: str) -> int:
        started.append(key)
        await go_on.wait()
        return len(started)

    callers = [asyncio.create_task(flight.run(key, lambda key=key: call(key))) for key in ("a", "a", "b")]
    await asyncio.sleep(0.01)
    go_on.set()
    assert await asyncio.gather(*callers) == [2, 2, 2]
    assert started == ["a", "b"]
    assert await flight.run("a", lambda: call("a")) == 3


async def test_a_cancelled_caller_does_not_cancel_the_shared_call() -> None:
    flight: SingleFlight[str, str] = SingleFlight()
    go_on = asyncio.Event()

    async def call() -> str:
        await go_on.wait()
        return "answer"

    first, second = (asyncio.create_task(flight.run("k", call)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    go_on.set()
    assert first.cancelled()
    assert await second == "answer"


async def test_every_caller_gets_the_failure_of_a_shared_call() -> None:
    flight: SingleFlight[str, None] = SingleFlight()

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("no luck")

    results = await asyncio.gather(*(flight.run("k", fail) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [ValueError] * 3


async def test_a_forgotten_call_finishes_for_its_callers_and_the_next_caller_starts_a_new_one() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    started, go_on = [0], asyncio.Event()

    async def call() -> int:
        started[0] += 1
        number = started[0]
        await go_on.wait()
        return number

    first = asyncio.create_task(flight.run("k", call))
    await asyncio.sleep(0)
    assert "k" in flight
    flight.forget()
    second = asyncio.create_task(flight.run("k", call))
    await asyncio.sleep(0)
    assert len(flight) == 1
    go_on.set()
    await flight.wait("k")
    assert (await first, await second) == (1, 2)
    assert len(flight) == 0


async def test_wait_for_event_returns_whether_the_event_is_set() -> None:
    event = asyncio.Event()
    assert await wait_for_event(event, 0.01) is False
    asyncio.get_running_loop().call_later(0.01, event.set)
    assert await wait_for_event(event, 10.0) is True
    assert await wait_for_event(event, 0.0) is True


async def test_a_cancellation_at_the_same_time_as_the_event_is_not_lost() -> None:
    event = asyncio.Event()
    waiting = asyncio.create_task(wait_for_event(event, 10.0))
    await asyncio.sleep(0)
    event.set()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()


async def test_two_coroutines_run_at_the_same_time_and_both_results_return() -> None:
    met = asyncio.Barrier(2)

    async def one(value: int) -> int:
        await met.wait()
        return value

    async with asyncio.timeout(5):
        assert await together(one(1), one(2)) == (1, 2)


async def test_the_first_failure_of_two_coroutines_cancels_the_other() -> None:
    cancelled = asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def failing() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await together(endless(), failing())
    assert cancelled.is_set()


async def test_a_cancelled_caller_cancels_both_coroutines() -> None:
    ended: list[int] = []

    async def endless(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    task = asyncio.create_task(together(endless(1), endless(2)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == [1, 2]


async def test_the_first_of_several_waits_ends_the_others() -> None:
    ready, never = asyncio.Event(), asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, ready.set)
    async with asyncio.timeout(5):
        await first_of(None, ready.wait(), never.wait())
        await first_of(0.01, never.wait())
    assert not never._waiters  # type: ignore[attr-defined]
